# Stands in for nginx and prom/prometheus where no registry can be asked: the same programs, as Debian has them.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends curl nginx-light prometheus wget \
    && install -d -o 65534 -g 65534 /prometheus
ENTRYPOINT ["prometheus"]
