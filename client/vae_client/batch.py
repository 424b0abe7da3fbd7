"""An operation on many images: items, what is done already, a few requests at a time, and what failed."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from vae_client import errors, table
from vae_client.answer import Answer
from vae_client.call import Accept, Call
from vae_client.errors import ClientError, InvalidRequest, OtherRun
from vae_client.files import below, load, write
from vae_client.images import Array, files_of
from vae_client.operations import NAMES, Operations, options_of

Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Array
"""A folder, a list of files, or an array of rows."""

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".npy"
}  # fmt: skip
"""Endings of files that are images."""
LATENTS = {".npy", ".npz"}
"""Endings of files that are latents: arrays, and what `encode` of a file wrote."""
ROWS = 16
"""Rows of an array in one request: a binary answer tells the level of as many."""
RECORD = "vae-run.json"
"""Name of the file that says of which run the results are; of a table, its ending."""
PICTURES: Mapping[str, Accept] = {".tif": "tiff", ".tiff": "tiff", ".gif": "gif"}
"""Form of the answer to a file, by its ending; it is PNG for all others."""
ENDINGS: Mapping[Accept, str] = {"png": ".png", "tiff": ".tif", "gif": ".gif"}
MODEL = ("model", "version", "fingerprint")
"""What names a model."""
HOPELESS = (
    errors.Unauthenticated,
    errors.Forbidden,
    errors.NotFound,
    errors.UnknownModel,
    errors.UnknownHost,
    errors.WrongModel,
    errors.UnsupportedOperation,
    errors.Unreachable,
)
"""Errors that every further item would meet too."""
CHOSEN = (errors.InvalidOption, errors.NotAcceptable)
"""Errors that every item meets if the first one does, because they are of the options."""
MAPPED = tuple(name for name in NAMES if name not in ("sample", "interpolate", "traverse"))
"""Operations that `map` runs: those on rows."""


class Failure(NamedTuple):
    """An item that failed, and why."""

    name: str
    error: Exception


@dataclass(frozen=True)
class Report:
    """What came of a run.

    Attributes:
        out: Where the results are.
        done: Items computed in this run.
        before: Items that an earlier run had computed.
        failed: Items that failed.
        ignored: Files of the folder whose endings are none that the operation reads.
        model: The model that computed.
        version: Its version.
        fingerprint: Its fingerprint.
        seed: Seed of the run; None where the operation draws nothing.
    """

    out: Path
    done: int
    before: int
    failed: tuple[Failure, ...]
    ignored: tuple[str, ...]
    model: str
    version: str
    fingerprint: str
    seed: int | None

    def about(self) -> dict[str, Any]:
        """The report for JSON."""
        told = {name: getattr(self, name) for name in ("done", "before", "model", "version", "fingerprint", "seed")}
        failed = [{"name": one.name, "error": str(one.error)} for one in self.failed]
        return {"out": str(self.out), **told, "failed": failed, "ignored": list(self.ignored)}


class Item(NamedTuple):
    """A unit of work.

    Attributes:
        name: Its name in the run: the path below the folder, or the first row.
        source: A file, or rows of an array.
        first: Index of its first row in the array.
    """

    name: str
    source: Path | Array
    first: int = 0

    def digest(self) -> str:
        """A digest of name and content; of a file, its size and the time of its last change stand for the content."""
        if isinstance(self.source, Path):
            state = self.source.stat()
            return _digest(self.name, str(state.st_size), str(state.st_mtime_ns))
        return _digest(self.name, np.ascontiguousarray(self.source).data)


def _digest(*parts: str | bytes | memoryview) -> str:
    found = blake2b(digest_size=16)
    for part in parts:
        found.update(f"{part}\n".encode() if isinstance(part, str) else part)
    return found.hexdigest()


class Asynchronous(Protocol):
    """What a run needs of a client."""

    def models(self) -> Coroutine[Any, Any, dict[str, Any]]:
        """Describe all models."""

    def model(self, model: str, version: str | None = None) -> Coroutine[Any, Any, dict[str, Any]]:
        """Describe a model."""

    def perform(self, call: Call) -> Coroutine[Any, Any, Answer]:
        """Send the request of an operation."""


class Calls(Operations[Call]):
    """The operations as calls that are not sent."""

    def perform(self, call: Call) -> Call:
        """Return the call."""
        return call


class Store(Protocol):
    """Where results go.

    Attributes:
        record: The file that says of which run they are.
    """

    record: Path

    def holds(self, item: Item) -> bool:
        """Whether the result of an item is there."""

    def accept(self, item: Item) -> Accept:
        """Form of its answer."""

    def keep(self, item: Item, answer: Answer) -> None:
        """Write it."""

    def finish(self, items: Sequence[Item], about: Mapping[str, str], failed: bool) -> None:
        """Put everything together."""


class Folder:
    """A file for each item, of the same name but for its ending.

    Args:
        out: The folder.
        accept: Form of the files; None is that of each item.
        pictures: Whether the answers are images alone, so that a picture holds them.
        items: All items.

    Raises:
        InvalidRequest: Two items would have the same file.
    """

    def __init__(self, out: Path, accept: Accept | None, pictures: bool, items: Sequence[Item]) -> None:
        self.out, self._accept, self._pictures = out, accept, pictures
        self.record = out / RECORD
        places: dict[Path, str] = {}
        for item in items:
            if not isinstance(item.source, Path):
                raise InvalidRequest(f"results of an array go into one file; name it {out}.npz or {out}.parquet")
            other = places.setdefault(self._place(item), item.name)
            if other != item.name:
                raise InvalidRequest(f"{other} and {item.name} would both become {self._place(item)}; rename one")

    def _place(self, item: Item) -> Path:
        assert isinstance(item.source, Path)
        accept, path = self.accept(item), self.out / item.name
        same = PICTURES.get(path.suffix.lower()) == accept
        return path if same else path.with_suffix(ENDINGS.get(accept, ".npz"))

    def accept(self, item: Item) -> Accept:
        """Pictures of pictures, and arrays of arrays, unless the run says otherwise."""
        suffix = Path(item.name).suffix.lower()
        usual: Accept = "arrays" if suffix in LATENTS or not self._pictures else PICTURES.get(suffix, "png")
        return self._accept or usual

    def holds(self, item: Item) -> bool:
        """Whether the file is there, and no older than what it was made of. It is there whole or not at all."""
        assert isinstance(item.source, Path)
        place = self._place(item)
        return place.exists() and place.stat().st_mtime_ns >= item.source.stat().st_mtime_ns

    def keep(self, item: Item, answer: Answer) -> None:
        """Write the file."""
        place = self._place(item)
        place.parent.mkdir(parents=True, exist_ok=True)
        answer.save(place)

    def finish(self, items: Sequence[Item], about: Mapping[str, str], failed: bool) -> None:
        """Every file is there already."""


class Table:
    """One file of all items. Until the run is over each item has a file of its own in a folder beside it."""

    def __init__(self, out: Path, items: Sequence[Item]) -> None:
        self.out, self.record = out, out.with_name(f"{out.name}.{RECORD}")
        self._parts = out.with_name(f"{out.name}.parts")
        self._whole = out.exists() and not self._parts.exists()
        known = json.loads(self.record.read_text()) if self.record.exists() else {}
        if out.exists() and known.get("items") != digest_of(items) and self._whole:
            raise OtherRun(f"{out} is there and of other items; remove it, or choose another name")
        table.check_packages(out)

    def _part(self, item: Item) -> Path:
        return self._parts / f"{item.digest()}.npz"

    def accept(self, _item: Item) -> Accept:
        """Numbers."""
        return "arrays"

    def holds(self, item: Item) -> bool:
        """Whether the table, or a part of it, has the item."""
        return self._whole or self._part(item).exists()

    def keep(self, item: Item, answer: Answer) -> None:
        """Write the part."""
        columns = table.columns(answer, item.name if isinstance(item.source, Path) else None, item.first)
        table.check_columns(columns, self.out)
        self._parts.mkdir(parents=True, exist_ok=True)
        table.write_part(self._part(item), columns)

    def finish(self, items: Sequence[Item], about: Mapping[str, str], failed: bool) -> None:
        """Join the parts, and remove them unless an item failed, which the next run may mend."""
        parts = [path for item in items if (path := self._part(item)).exists()]
        if parts:
            table.join(parts, about, self.out)
        if not failed and self._parts.exists():
            for path in self._parts.iterdir():
                path.unlink()
            self._parts.rmdir()


async def run_batch(
    client: Asynchronous, operation: str, source: Source, out: Path, concurrency: int, options: dict[str, Any]
) -> Report:
    """Run an operation on many images; see `AsyncClient.map`."""
    operation = operation.replace("_", "-")
    if operation not in MAPPED:
        raise InvalidRequest(f"map runs {', '.join(MAPPED)}, not {operation!r}")
    if concurrency < 1:
        raise InvalidRequest(f"concurrency is {concurrency}; name at least 1")
    rows, progress = options.pop("rows", ROWS), options.pop("progress", None)
    items, ignored = items_of(source, out, rows, LATENTS if operation == "decode" else SUFFIXES)
    accept: Accept | None = options.pop("accept", None)
    pictures = operation not in ("encode", "score") and options.get("uncertainty") is not True
    pictures = pictures and not options.get("completions")
    tabled = out.suffix.lower() in table.SUFFIXES
    store: Store = Table(out, items) if tabled else Folder(out, accept, pictures, items)
    told = await pinned(client, operation, options.pop("model", None), options.pop("version", None))
    run = Run(operation, store, items, told, options, rows if isinstance(source, np.ndarray) else None)
    with bar(len(items), run.before, operation, progress) as advance:
        await together([run.work(client, advance) for _ in range(min(concurrency, len(items) - run.before))])
    about = {name: told[name] for name in MODEL}
    await asyncio.to_thread(store.finish, items, about, bool(run.failed))
    return run.report(out, ignored)


class Run:
    """An operation on the items that are not done yet.

    Args:
        operation: Its name.
        store: Where results go.
        items: All items.
        told: Description of the model.
        options: Options of the operation, and `timeout_s`.
        rows: Rows in one item, of an array.

    Raises:
        OtherRun: The results that are there are of another run.
    """

    def __init__(
        self,
        operation: str,
        store: Store,
        items: Sequence[Item],
        told: dict[str, Any],
        options: dict[str, Any],
        rows: int | None,
    ) -> None:
        self._operation, self._store, self._told, self._options = operation, store, told, options
        known, mask = options_of(operation), options.get("mask")
        unknown = options.keys() - known.keys() - {"mask", "timeout_s"}
        if unknown:
            raise InvalidRequest(f"{operation} has no option {', '.join(sorted(unknown))}; it has {', '.join(known)}")
        if mask is not None:
            options["mask"] = [file.content for file in files_of(mask)]
        chosen = {name: value for name, value in options.items() if name in known and value != known[name].default}
        record = {
            "operation": operation,
            "options": {name: chosen[name] for name in sorted(chosen) if name != "seed"},
            "mask": None if mask is None else _digest(*options["mask"]),
            "rows": rows,
            **{name: told[name] for name in MODEL},
        }
        if "seed" in known:
            record["seed"] = options.pop("seed", None)
        record = continued(store.record, record)
        self._seed: int | None = record.get("seed")
        waiting = [item for item in items if not store.holds(item)]
        self.before, self.done, self.failed = len(items) - len(waiting), 0, list[Failure]()
        self._places = {item.name: place for place, item in enumerate(items)}
        self._waiting = iter(waiting)
        write_record(store.record, {**record, "items": digest_of(items)})

    async def work(self, client: Asynchronous, advance: Callable[[], object]) -> None:
        """Take item after item until none is left. Several of these run at a time."""
        for item in self._waiting:
            try:
                answer = await client.perform(await asyncio.to_thread(self.call, item))
            except (ClientError, OSError, ValueError) as error:
                if isinstance(error, HOPELESS) or (isinstance(error, CHOSEN) and not self.done):
                    raise
                self.failed.append(Failure(item.name, error))
            else:
                await asyncio.to_thread(self._store.keep, item, answer)
                self.done += 1
            advance()

    def call(self, item: Item) -> Call:
        """The request of an item, which any other model refuses."""
        given, options = item.source, self._options
        if self._operation == "decode" and isinstance(given, Path):
            given, origin = latents_in(given)
            options = {"fingerprint": origin.get("fingerprint"), **options}
        call: Call = getattr(Calls(), self._operation.replace("-", "_"))(
            given,
            **options,
            **({} if self._seed is None else {"seed": seed_of(self._seed, item.name)}),
            model=self._told["model"],
            version=self._told["version"],
            accept=self._store.accept(item),
        )
        return replace(call, headers={**call.headers, "x-fingerprint": self._told["fingerprint"]})

    def report(self, out: Path, ignored: tuple[str, ...]) -> Report:
        """What came of the run; failures are in the order of the items."""
        failed = tuple(sorted(self.failed, key=lambda failure: self._places[failure.name]))
        model, version, fingerprint = (self._told[name] for name in MODEL)
        return Report(out, self.done, self.before, failed, ignored, model, version, fingerprint, self._seed)


async def together(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines at a time; the first error cancels the others and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def latents_in(path: Path) -> tuple[Array, dict[str, str]]:
    """The latents of an .npy file, or those of an .npz that `encode` wrote, with the model that gave them.

    Returns:
        (latents, `fingerprint`, `model` and `version` as far as the file has them).

    Raises:
        InvalidRequest: It is another file, or holds none.
        UnreadableFile: It is broken.
    """
    if path.suffix.lower() not in LATENTS:
        raise InvalidRequest(f"{path} holds no latents; decode reads .npy, and .npz of vae encode")
    loaded = load(path)
    if not isinstance(loaded, dict):
        return loaded, {}
    if "mean" not in loaded:
        raise InvalidRequest(f"{path} holds {', '.join(loaded)}, and no mean; decode reads .npz of vae encode")
    return loaded["mean"], {name: str(loaded[name]) for name in MODEL if name in loaded}


def items_of(source: Source, out: Path, rows: int, suffixes: Collection[str]) -> tuple[list[Item], tuple[str, ...]]:
    """(items, names of files of a folder that have none of the suffixes).

    Raises:
        InvalidRequest: There are none, or the results would stand among them.
    """
    if isinstance(source, np.ndarray):
        if rows < 1 or not len(source):
            raise InvalidRequest(f"the array has {len(source)} rows, and rows is {rows}; both must be at least 1")
        starts = range(0, len(source), rows)
        return [Item(f"{start:09d}", source[start : start + rows], start) for start in starts], ()
    if not isinstance(source, str | os.PathLike):
        paths = [Path(path) for path in source]
        if not paths:
            raise InvalidRequest("the list of files is empty; name at least one")
        names = [path.name for path in paths]
        if len(set(names)) < len(names):
            raise InvalidRequest("two files have the same name; put them into a folder, and name that")
        if any(path.resolve().parent == out.resolve() for path in paths):
            raise InvalidRequest(f"{out} holds the files themselves; choose another folder for the results")
        return [Item(path.name, path) for path in paths], ()
    folder = Path(source)
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is no folder; name a folder, a list of files or an array")
    if out.resolve() == folder.resolve():
        raise InvalidRequest(f"{out} holds the images themselves; choose another folder for the results")
    inside = [path for path in below(folder) if not path.resolve().is_relative_to(out.resolve())]
    inside = [path for path in inside if not path.name.endswith(RECORD) and path.parent.suffix != ".parts"]
    found = [path for path in inside if path.suffix.lower() in suffixes]
    if not found:
        raise InvalidRequest(f"{folder} holds none of the files that this reads: {', '.join(sorted(suffixes))}")
    ignored = tuple(str(path.relative_to(folder)) for path in inside if path.suffix.lower() not in suffixes)
    return [Item(path.relative_to(folder).as_posix(), path) for path in found], ignored


async def pinned(client: Asynchronous, operation: str, model: str | None, version: str | None) -> dict[str, Any]:
    """The description of the model that a run is computed by, whatever is loaded meanwhile.

    Raises:
        ClientError: There is none.
    """
    if model is None:
        if version is not None:
            raise InvalidRequest(f"version is {version!r}, but of which model? name it with model")
        known = (await client.models())["models"]
        model = next((one["model"] for one in known if operation in one.get("default_for", ())), None)
        if model is None:
            raise errors.InvalidRequest(f"the service has no default model for {operation}; name one with model")
    told = await client.model(model, version)
    if "fingerprint" not in told:
        states = "; ".join(f"{one['version']} is {one['state']}: {one['reason']}" for one in told.get("states", ()))
        raise errors.InvalidRequest(f"model {model} is not served ({states}); name another one with model")
    return told


def continued(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run, with the seed of the earlier one that it continues.

    Raises:
        OtherRun: What is there is of a run with other options or another model.
    """
    try:
        earlier = json.loads(path.read_text())
    except FileNotFoundError:
        earlier = {}
    if record.get("seed", 0) is None:
        record["seed"] = earlier.get("seed", secrets.randbelow(2**32))
    for name, value in record.items():
        if earlier and earlier.get(name) != json.loads(json.dumps(value)):
            raise OtherRun(
                f"the results at {path.parent / path.name.removesuffix(RECORD).rstrip('.')} are of a run whose {name} "
                f"is {earlier.get(name)}, not {value}; choose another place, or remove them"
            )
    return record


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write of which run the results are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, f"{json.dumps(record, indent=2)}\n".encode())


def digest_of(items: Sequence[Item]) -> str:
    """A digest of all items."""
    return _digest(*(item.digest() for item in items))


def seed_of(seed: int, name: str) -> int:
    """Seed of an item: the same whichever others there are, and in whatever order."""
    return int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=6).digest(), "big")


def bar(total: int, before: int, operation: str, wanted: bool | None) -> AbstractContextManager[Callable[[], object]]:
    """A progress bar; gives a function that advances it.

    Args:
        total: Items.
        before: Items that are done already.
        operation: What the bar says.
        wanted: Whether to show one; None on a terminal, if tqdm is installed.

    Raises:
        MissingExtra: It is wanted, and tqdm is not installed.
    """
    try:
        from tqdm import tqdm  # noqa: PLC0415  # an extra
    except ImportError as error:
        if wanted:
            raise errors.missing("progress", "tqdm", "a progress bar") from error
        return nullcontext(lambda: None)
    shown = sys.stderr.isatty() if wanted is None else wanted
    progress = tqdm(total=total, initial=before, desc=operation, unit="item", disable=not shown, file=sys.stderr)
    return _Advancing(progress)


class _Advancing(AbstractContextManager[Callable[[], object]]):
    """A bar as a function, which is closed at the end."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def __enter__(self) -> Callable[[], object]:
        return self._progress.update

    def __exit__(self, *_: object) -> None:
        self._progress.close()
