"""The command line `vae`: a command for each operation, `models` and `compare`."""

from __future__ import annotations

import argparse
import errno
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import numpy as np

from vae_client import errors, local, table
from vae_client.answer import Answer
from vae_client.batch import MAPPED, Report, latents_in
from vae_client.call import Accept, Common
from vae_client.client import KEY_VARIABLE, URL_VARIABLE, Client
from vae_client.comparison import compare
from vae_client.errors import ClientError, InvalidRequest, NoAddress, Problem, missing
from vae_client.operations import NAMES, method_of, options_of
from vae_client.version import VERSION

REFUSED, USAGE, SOME_FAILED, UNAVAILABLE, TIMED_OUT, INTERRUPTED = 1, 2, 3, 4, 5, 130
EXIT_CODES = f"""exit codes:
  0            done
  {REFUSED}            the service refused, or a file cannot be read or written; the message names the fix
  {USAGE}            the command line is wrong
  {SOME_FAILED}            some of many files failed; the others are done
  {UNAVAILABLE}            no service answers, or it is overloaded or not ready: try again later
  {TIMED_OUT}            the deadline passed
  {INTERRUPTED}          interrupted with Ctrl-C; the same command continues where it ended
"""
DESCRIPTION = f"""Ask a VAE service. Name it with --url or in {URL_VARIABLE}, and its key in {KEY_VARIABLE};
or start the one that is installed beside this command with --local.

  vae denoise scan.tif -o clean.tif
  vae sample -n 64 --seed 7 -o sheet.png
  vae encode folder/ -o latents.parquet
"""
PICTURES: dict[str, Accept] = {".png": "png", ".tif": "tiff", ".tiff": "tiff", ".gif": "gif"}
ARRAYS = (".npy", ".npz")
STANDARD = "-"
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""How shells complete the name of a file."""
SHORT = {"count": ("-n",)}
"""Short names of options."""
FIXES: dict[type[ClientError], str] = {
    errors.Unauthenticated: f"the variable is {KEY_VARIABLE}",
    **dict.fromkeys((errors.TimedOut, errors.DeadlinePassed), "the option is --timeout"),
}
"""What a command has in place of the argument or the header that an error names."""
OF_STREAMS = ("preview",)
"""Options that change streams alone, which commands do not ask for."""


class Parser(argparse.ArgumentParser):
    """A parser whose error is one line in the style of all others."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line; by default that of the process.

    Returns:
        Exit status; `EXIT_CODES` says what each means.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return told(options, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  # the interpreter flushes it at the end
        return 0
    except (ClientError, OSError) as error:
        return told(options, error, status_of(error))


def status_of(error: Exception) -> int:
    """The exit status of an error."""
    if isinstance(error, errors.TimedOut | errors.DeadlinePassed):
        return TIMED_OUT
    if isinstance(error, errors.Unreachable) or (isinstance(error, Problem) and error.status in (429, 503)):
        return UNAVAILABLE
    return USAGE if isinstance(error, NoAddress | InvalidRequest) else REFUSED


def told(options: argparse.Namespace, error: Exception | str, status: int) -> int:
    """Write an error in one line on standard error, or as JSON with --json; returns the exit status."""
    detail = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and not isinstance(error, ClientError):
        detail = f"{error.filename}: {error.strerror}"
    about = (
        {"code": error.code, "status": error.status, "request_id": error.request_id}
        if isinstance(error, Problem)
        else {}
    )
    detail += next((f"; {fix}" for kind, fix in FIXES.items() if isinstance(error, kind)), "")
    if options.json:
        print(json.dumps({"error": {"detail": detail, **about}}), file=sys.stderr)
    else:
        named = f" ({error.code})" if isinstance(error, Problem) else ""
        print(f"vae: {detail}{named}", file=sys.stderr)
    return status


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with the options of every operation as its method has them."""
    parser = Parser("vae", description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", action="version", version=f"vae {VERSION}")
    parser.add_argument(
        "--print-completion", action=Completion, help="print a script that completes commands in a shell"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for operation in NAMES:
        _add_operation(commands, operation)
    models = _add(commands, "models", "List the models of the service, or describe one.", list_models)
    models.add_argument("model", nargs="?", metavar="MODEL[:VERSION]", help="a model to describe")
    models.add_argument("--card", action="store_true", help="print its model card, in Markdown")
    comparison = _add(
        commands, "compare", "Compare two pictures by PSNR and SSIM. No service is asked.", compare_files, False
    )
    for name in ("first", "second"):
        _completed(comparison.add_argument(name, help="a picture or an .npy file"))
    return parser


def _add(commands: Any, name: str, about: str, run: Any, asks: bool = True) -> argparse.ArgumentParser:
    """Add a command, with the options of all that ask a service."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="write what came of it, and errors, as JSON")
    if asks:
        group = parser.add_argument_group("service")
        group.add_argument("--url", metavar="URL", help=f"its address; by default {URL_VARIABLE}")
        group.add_argument(
            "--local", action="store_true", help="start the service that is installed beside this command"
        )
        _completed(group.add_argument("--models", metavar="FOLDER", help="with --local, its model repository"))
        group.add_argument(
            "--timeout", type=float, metavar="SECONDS", help="longest time for an answer, by default 120"
        )
    return parser


def _add_operation(commands: Any, operation: str) -> None:
    method = method_of(operation)
    about = (inspect.getdoc(method) or "").partition("\n")[0].replace("`", "")
    parser = _add(commands, operation, about.replace("%", "%%"), run_operation)
    parser.set_defaults(operation=operation)
    inputs = [name for name in ("images", "latents") if name in _inputs(operation)]
    if inputs:
        several = "a folder or several files are done one by one" if operation in MAPPED else "two files"
        parser.add_argument(
            "inputs", nargs="+", metavar=inputs[0].upper(), help=f"files; - is standard input; {several}"
        ).complete = FILES  # type: ignore[attr-defined]
    if "mask" in _inputs(operation):
        mask = "picture, black or transparent where a pixel is missing; or .npy"
        _completed(parser.add_argument("--mask", metavar="FILE", help=mask))
    _completed(
        parser.add_argument(
            "-o", "--out", required=operation != "score",
            help="result: .png, .tif, .gif, .npy, .npz; - is a PNG on standard output"
            + ("; of many, a folder or a table in .parquet, .npz or .csv" if operation in MAPPED else ""),
        )
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="NAME[:VERSION]", help="the model; by default the service's for this command"
    )
    if operation in MAPPED:
        parser.add_argument(
            "--concurrency", type=int, default=4, help="requests at a time, of many files; by default 4"
        )
        parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    group = parser.add_argument_group("options of the operation")
    for name, option in options_of(operation).items():
        if name in OF_STREAMS:
            continue
        names = (*SHORT.get(name, ()), f"--{name.replace('_', '-')}")
        usual = "" if option.default in (None, False) else f"; by default {option.default}"
        words = f"{_words(method)[name].replace('`', '').removesuffix('.')}{usual}"
        group.add_argument(*names, dest=f"option_{name}", help=words.replace("%", "%%"), **_reading(option.annotation))


def _inputs(operation: str) -> set[str]:
    return set(inspect.signature(method_of(operation)).parameters) - options_of(operation).keys()


def _completed(action: argparse.Action) -> None:
    """Have shells complete names of files."""
    action.complete = FILES  # type: ignore[attr-defined]


@cache
def _words(method: Any) -> dict[str, str]:
    """What the docstring of a method says of its arguments."""
    _, _, arguments = (inspect.getdoc(method) or "").partition("Args:\n")
    return dict(re.findall(r"^    (\w+): (.+)$", arguments, re.MULTILINE))


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads an option of a type."""
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, type(int | str)) else [hint]
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    plain = next((kind for kind in kinds if kind in (bool, int, float, str)), None)
    if plain is bool and not words:
        return {"action": "store_const", "const": True}
    if plain is bool:
        return {"nargs": "?", "const": True, "choices": [True, *words], "metavar": "|".join(words)}
    if plain in (int, float) and words:
        return {"type": lambda word: word if word in words else _number(word), "metavar": f"NUMBER|{'|'.join(words)}"}
    if words:
        return {"choices": words}
    names = {int: "NUMBER", float: "NUMBER", str: "TEXT"}
    return {"type": plain, "metavar": names[plain or str]}


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is no number") from error


class Completion(argparse.Action):
    """Prints the completion script of a shell, and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:  # noqa: A002  # argparse's name
        super().__init__(option_strings, dest, choices=("bash", "zsh", "tcsh"), help=help, metavar="SHELL")

    def __call__(
        self, parser: argparse.ArgumentParser, _options: object, values: Any, _name: str | None = None
    ) -> None:
        """Print it."""
        try:
            import shtab  # noqa: PLC0415  # an extra
        except ImportError:
            parser.exit(REFUSED, f"vae: {missing('completion', 'shtab', 'shell completion')}\n")
        print(shtab.complete(parser, shell=values))
        parser.exit()


@contextmanager
def asking(options: argparse.Namespace) -> Iterator[Client]:
    """A client of the service that the command line names.

    Raises:
        NoAddress: It names none.
        InvalidRequest: It names two.
    """
    if options.local and options.url:
        raise InvalidRequest("--local starts a service, and --url names one; leave one of them out")
    if options.models and not options.local:
        raise InvalidRequest("--models is of the service that --local starts; add --local, or leave it out")
    if options.local:
        with local.started(options.models) as url, Client(url, "", timeout_s=options.timeout) as client:
            yield client
        return
    try:
        client = Client(options.url, timeout_s=options.timeout)
    except NoAddress:
        raise NoAddress(
            f"which service? name its address with --url or in {URL_VARIABLE}, or start the one that is installed "
            "beside this command with --local"
        ) from None
    with client:
        yield client


def run_operation(options: argparse.Namespace) -> int:
    """Run an operation on one request, or on many files."""
    operation: str = options.operation
    chosen = {
        name.removeprefix("option_"): value
        for name, value in vars(options).items()
        if name.startswith("option_") and value is not None
    }
    if getattr(options, "mask", None):
        chosen["mask"] = options.mask
    name, _, version = (options.model or "").partition(":")
    common: Common = {"model": name or None, "version": version or None}
    inputs = [Path(one) for one in getattr(options, "inputs", ())]
    many = len(inputs) > 1 or (inputs and inputs[0].is_dir()) or table_asked(options.out)
    mapped = operation in MAPPED and many and options.out is not None
    check_places(inputs, None if mapped else options.out)
    with asking(options) as client:
        if mapped:
            return run_many(client, options, inputs, {**chosen, **common})
        if inputs and inputs[0].is_dir():
            raise InvalidRequest("the results of a folder go into a folder or a table; name it with --out")
        accept = accept_for(options.out)
        call = getattr(client, operation.replace("-", "_"))
        given = () if not inputs else (sent(operation, inputs, chosen, common),)
        answer: Answer = call(*given, **chosen, **common, accept=accept)
    return written(options, answer)


def check_places(inputs: Sequence[Path], out: str | None) -> None:
    """Check before anything is computed that the files are there, and the folder of the result.

    Args:
        inputs: The files.
        out: The result; None where there is none, or its folder will be made.

    Raises:
        FileNotFoundError: A file is not there.
        InvalidRequest: The folder of the result is not there.
    """
    for path in inputs:
        if str(path) != STANDARD and not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    folder = Path(out or STANDARD).parent
    if not folder.is_dir():
        raise InvalidRequest(f"{out} is to be in {folder}, which is no folder; create it")


def table_asked(out: str | None) -> bool:
    """Whether the result is a table that only `map` writes."""
    return out is not None and Path(out).suffix.lower() in (".parquet", ".csv")


def accept_for(out: str | None) -> Accept:
    """Form of the answer, by the ending of the result.

    Raises:
        InvalidRequest: It has another ending.
    """
    if out is None:
        return "json"
    suffix = Path(out).suffix.lower()
    if out == STANDARD:
        return "png"
    if suffix not in PICTURES and suffix not in ARRAYS:
        known = ", ".join([*PICTURES, *ARRAYS])
        raise InvalidRequest(f"{out} ends in none of {known}; the ending of the result says what it is")
    return PICTURES.get(suffix, "arrays")


def sent(operation: str, inputs: Sequence[Path], chosen: dict[str, Any], common: Common) -> Any:
    """What is sent of the files of a command; latents that name their model go to it if the command names none.

    Raises:
        InvalidRequest: They hold no latents.
        UnreadableFile: They are broken.
    """
    if operation == "decode":
        latents, origin = latents_in(inputs[0])
        if "fingerprint" in origin:
            chosen.setdefault("fingerprint", origin["fingerprint"])
        if common["model"] is None and {"model", "version"} <= origin.keys():
            common["model"], common["version"] = origin["model"], origin["version"]
        return latents
    files: list[Any] = [sys.stdin.buffer.read() if str(path) == STANDARD else path for path in inputs]
    return files if len(files) > 1 else files[0]


def written(options: argparse.Namespace, answer: Answer) -> int:
    """Write an answer, and what there is to say of it."""
    if options.out == STANDARD:
        sys.stdout.buffer.write(answer.content)
        sys.stdout.buffer.flush()
        return 0
    if options.out is not None:
        answer.save(options.out)
    numbers = {name: array.tolist() for name, array in answer.outputs.items() if array.ndim == 1}
    if options.json:
        print(json.dumps({**({} if options.out is None else {"out": options.out}), **answer.about(), **numbers}))
        return 0
    for note in answer.notes:
        print(f"vae: note: {note.detail} ({note.code})", file=sys.stderr)
    seed = "" if answer.seed is None else f", seed {answer.seed}"
    print(f"{options.out or 'scores'}: {answer.model} version {answer.version}{seed}", file=sys.stderr)
    if options.out is None:
        names = options.inputs if len(options.inputs) == len(next(iter(numbers.values()))) else None
        columns = {**({"file": names} if names else {}), **numbers}
        print_table(list(columns), list(zip(*columns.values(), strict=True)))
    return 0


def run_many(client: Client, options: argparse.Namespace, inputs: Sequence[Path], chosen: dict[str, Any]) -> int:
    """Run an operation on many files; list those that failed at the end."""
    if len(inputs) > 1 and any(path.is_dir() for path in inputs):
        raise InvalidRequest("name one folder, or several files")
    if any(str(path) == STANDARD for path in inputs):
        raise InvalidRequest("standard input is one picture; leave - out, or name it alone with a picture as --out")
    source = inputs[0] if inputs[0].is_dir() else list(inputs)
    out = Path(options.out)
    if out.suffix.lower() not in table.SUFFIXES and out.suffix and not out.is_dir():
        raise InvalidRequest(f"the results of many files go into a folder or a table, and {out} is neither")
    progress = False if options.no_progress or options.json else None
    report = client.map(options.operation, source, out, concurrency=options.concurrency, progress=progress, **chosen)
    return reported(options, report)


def reported(options: argparse.Namespace, report: Report) -> int:
    """Write what came of many files."""
    if options.json:
        print(json.dumps(report.about()))
    else:
        before = f", {report.before} were done before" if report.before else ""
        ignored = f", {len(report.ignored)} are of other kinds" if report.ignored else ""
        print(f"{report.out}: {report.done} done{before}{ignored}", file=sys.stderr)
        for name, error in report.failed:
            print(f"vae: {name}: {' '.join(str(error).split())}", file=sys.stderr)
        if report.failed:
            print(f"vae: {len(report.failed)} failed; the same command tries them again", file=sys.stderr)
    return SOME_FAILED if report.failed else 0


def list_models(options: argparse.Namespace) -> int:
    """List the models, or describe one."""
    if options.card and not options.model:
        raise InvalidRequest("--card is of one model; name it")
    with asking(options) as client:
        if options.model:
            name, _, version = options.model.partition(":")
            one = client.card(name, version or None) if options.card else client.model(name, version or None)
            print(one if isinstance(one, str) else json.dumps(one, indent=2))
            return 0
        found = client.models()["models"]
    if options.json:
        print(json.dumps(found))
        return 0
    rows = [
        (
            one["model"],
            one.get("version", "not served"),
            images_of(one),
            ", ".join(one.get("operations", ())),
            "all" if set(one["default_for"]) == set(NAMES) else ", ".join(one["default_for"]) or "-",
        )
        for one in found
    ]
    print_table(["model", "version", "images", "operations", "default for"], rows)
    return 0


def images_of(described: dict[str, Any]) -> str:
    """Shape of a model's images, with the channels of every variant: "1 or 3 x height x width"."""
    shapes = [one["input_shape"] for one in (described, *described.get("variants", ())) if "input_shape" in one]
    if not shapes:
        return ""
    return " x ".join([" or ".join(str(shape[0]) for shape in shapes), *map(str, shapes[0][1:])])


def compare_files(options: argparse.Namespace) -> int:
    """Compare two files."""
    found = compare(options.first, options.second)
    if options.json:
        print(json.dumps({"psnr_db": found.psnr_db if np.isfinite(found.psnr_db) else None, "ssim": found.ssim}))
        return 0
    print(f"PSNR {found.psnr_db:.2f} dB")
    print("SSIM needs images of 11 x 11 pixels at least" if found.ssim is None else f"SSIM {found.ssim:.4f}")
    return 0


def print_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows in columns."""
    texts = [[f"{one:.2f}" if isinstance(one, float) else str(one) for one in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *texts, strict=True)]
    for row in [list(names), *texts]:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
