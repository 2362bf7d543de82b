# `dgm4 serve` on a CPU. docs/serving.md has the commands that build and run it.
FROM python:3.11-bookworm AS build
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE NOTICE ./
COPY dgm4 dgm4
COPY engine engine
COPY export export
COPY kernels kernels
RUN python -m venv /opt/dgm4 \
    && /opt/dgm4/bin/pip install --no-cache-dir -c constraints.txt ".[cpu,serve]"

FROM python:3.11-slim-bookworm
COPY --from=build /opt/dgm4 /opt/dgm4
# Nothing is written at run time, so the root may be read-only and the user needs no home.
ENV PATH=/opt/dgm4/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=3)"]
ENTRYPOINT ["dgm4", "serve", "--host", "0.0.0.0"]
CMD ["demo:asap"]
