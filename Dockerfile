# Targets: `service` (the default, no torch), `ray` (the same with Ray Serve), `train` and `gpu` (gigabytes each). All but
# the default are built only when asked for.
# Needs BuildKit, which skips the stages that a target does not use.

FROM python:3.11-slim AS build
# For a mirror, or for CPU wheels of torch in `train`; empty means pip's own default.
ARG PIP_INDEX_URL=""
ARG PIP_EXTRA_INDEX_URL=""
# Of the service's own extras, for example "remote,tracing".
ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# pip stays outside, so that what is shipped has none.
RUN python -m venv --without-pip /venv
COPY pyproject.toml constraints.txt ./
# Dependencies are installed before the code, so that a change of code does not fetch them again.
RUN python <<EOF
import os, pathlib, tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
service = project["dependencies"] + [line for name in os.environ["EXTRAS"].split(",") if name for line in extras[name]]
# The CUDA build takes the place of onnxruntime, at its version, and brings CUDA's libraries.
pin = next(line for line in pathlib.Path("constraints.txt").read_text().split() if line.startswith("onnxruntime=="))
gpu = [line for line in service if line != "onnxruntime"] + [pin.replace("==", "-gpu[cuda,cudnn]==")]
for name, lines in {
    "service": service, "train": service + extras["train"], "gpu": gpu, "ray": extras["ray-serve"],
}.items():
    pathlib.Path(name + ".txt").write_text("\n".join(lines) + "\n")
EOF
# The image has no compiler: a package without a wheel is told as such.
ENV INSTALL="pip --python /venv/bin/python install --constraint constraints.txt --only-binary :all:"
# The bill of materials: what was installed, in which version, under which licence, needed by whom. That it is valid has
# been seen once for the version that makes it; to look again takes longer than all the rest of it.
ENV BILL="cyclonedx-py environment --no-validate --output-reproducible --output-file /venv/sbom.cdx.json /venv"

# Beside the environment that it describes, so that it puts nothing into it.
FROM build AS bill
RUN python -m venv /bill && /bill/bin/pip install --constraint constraints.txt cyclonedx-bom

FROM build AS wheel
COPY README.md LICENSE ./
COPY service service
COPY training training
RUN pip wheel --no-deps --wheel-dir /wheel .

FROM build AS service-venv
RUN $INSTALL --requirement service.txt
COPY --from=wheel /wheel /wheel
# The wheel also holds the trainer, whose command could only fail without torch.
RUN $INSTALL --no-deps /wheel/*.whl && rm -r /venv/lib/python3.11/site-packages/training /venv/bin/vae-train
# What only developers of the packages use, over a quarter of all: tests, sources in C, converters of models, and onnxruntime
# once more for programs in C.
RUN cd /venv/lib/python3.11/site-packages && find . -type d -name tests -prune -exec rm -r {} + \
    && rm -r numpy/distutils numpy/f2py onnxruntime/quantization onnxruntime/tools onnxruntime/transformers \
    onnxruntime/capi/libonnxruntime.so* simdjson/simdjson.cpp simdjson/simdjson.h
# Of imagecodecs' hundred formats the service uses PNG and the compressions of TIFF: an eighth of 80 MB.
RUN cd /venv/lib/python3.11/site-packages && find imagecodecs imagecodecs.libs -name '*.so*' | grep -vE \
    '/(_deflate|_imcd|_lzma|_png|_shared|_shared_cython|_zlib|_zstd)\.|/lib(deflate|lzma|png16|zstd|z|zlib)[-.]' | xargs rm
RUN --mount=from=bill,source=/bill,target=/bill /bill/bin/$BILL

# Ray beside the service, which stays as it is in its own image.
FROM service-venv AS ray-venv
RUN $INSTALL --requirement ray.txt
COPY deploy/__init__.py deploy/ray_guard.py deploy/ray_serve.py deploy/ray.env /app/deploy/
RUN --mount=from=bill,source=/bill,target=/bill /bill/bin/$BILL

FROM build AS gpu-venv
RUN $INSTALL --requirement gpu.txt
COPY --from=wheel /wheel /wheel
RUN $INSTALL --no-deps /wheel/*.whl && rm -r /venv/lib/python3.11/site-packages/training /venv/bin/vae-train
RUN --mount=from=bill,source=/bill,target=/bill /bill/bin/$BILL

FROM build AS train-venv
RUN $INSTALL --requirement train.txt
COPY --from=wheel /wheel /wheel
RUN $INSTALL --no-deps /wheel/*.whl
RUN --mount=from=bill,source=/bill,target=/bill /bill/bin/$BILL

FROM build AS models
COPY models /models
# Readable by the container's user, whatever umask they were checked out with.
RUN chmod -R a+rX,go-w /models

# Python without what installs and what develops, nor Perl, which Debian's installers alone use. Copied whole into an
# empty image, since a layer cannot make those below it smaller.
FROM python:3.11-slim AS base
RUN cd /usr/local && rm -rf bin/pip* include lib/pkgconfig lib/python3.11/ensurepip lib/python3.11/idlelib \
    lib/python3.11/site-packages/* /var/cache/* /var/lib/apt/lists/* /usr/bin/perl* /usr/share/perl* /usr/lib/*/perl* \
    /usr/lib/*/libperl* /etc/perl

# What every target runs on.
FROM scratch AS runtime
COPY --from=base / /
# /tmp may be the only place that can be written. onnxruntime reports its use to its maker, and keeps a device id on
# disk, unless told otherwise before it is imported.
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 HOME=/tmp PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
WORKDIR /

# What both kinds of service share.
FROM runtime AS serving
COPY --from=models /models /models
# Reachable from outside the container, without keys where none are given; what is published of it, and where, is the
# engine's business.
ENV VAE_HOST=0.0.0.0 VAE_ALLOW_ANONYMOUS=true VAE_MODELS=/models
EXPOSE 8000
# Not through urllib, which would ask a proxy that the environment names. Kubernetes sets VAE_PORT=tcp://... for a
# service named vae.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s --retries=3 CMD \
    ["python", "-ISc", "import http.client as h, os, ssl; e = os.environ.get; port = e('VAE_OPS_PORT') or e('VAE_PORT') or ''; at = '127.0.0.1', int(port) if port.isdigit() else 8000; c = h.HTTPSConnection(*at, timeout=4, context=ssl._create_unverified_context()) if e('VAE_TLS_CERTIFICATE') else h.HTTPConnection(*at, timeout=4); c.request('GET', '/health/ready'); raise SystemExit(c.getresponse().status != 200)"]
CMD ["vae-serve"]

FROM runtime AS train
COPY --from=train-venv /venv /venv
COPY training/configs /configs
# Any user may keep checkpoints in /runs, where the trainer looks by default; torch asks for the user's name.
RUN mkdir -m 1777 /runs
ENV USER=trainer PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["vae-train"]
CMD ["--help"]

FROM serving AS gpu
COPY --from=gpu-venv /venv /venv
# CUDA's libraries came as Python packages, where the linker does not look by itself.
RUN find /venv -type d -path '*/nvidia/*/lib' > /etc/ld.so.conf.d/nvidia.conf && ldconfig
RUN python -c "import http.client, service.__main__"
ENV PYTHONDONTWRITEBYTECODE=1 VAE_EXECUTION_PROVIDER=cuda
USER 10001:10001

FROM serving AS ray
COPY --from=ray-venv /venv /venv
COPY --from=ray-venv /app /app
RUN python -c "import http.client, service.__main__, ray.serve"
# Ray asks for the user's name, and starts Python for every actor.
ENV PYTHONPATH=/app USER=ray RAY_SERVE_DEFAULT_HTTP_HOST=0.0.0.0 RAY_TMPDIR=/tmp PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001:10001
CMD ["ray", "--help"]

FROM serving AS service
COPY --from=service-venv /venv /venv
# pip has compiled the packages; this compiles the part of the standard library that they import, since the base image
# has none of it compiled and the running container can keep nothing.
RUN python -c "import http.client, service.__main__"
ENV PYTHONDONTWRITEBYTECODE=1
# By number, so that Kubernetes' runAsNonRoot can tell.
USER 10001:10001
