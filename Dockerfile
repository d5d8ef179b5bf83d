# hone as a container. Its RUN lines are targets of the Makefile.
#
#     make docker
#     docker run --rm -p 127.0.0.1:8080:8080 -e HONE_API_KEY=... -v hone:/data hone:local

FROM golang:1.26-bookworm AS go

FROM rust:1.95-bookworm AS build
COPY --from=go /usr/local/go /usr/local/go
ENV PATH=/usr/local/go/bin:$PATH GOFLAGS=-buildvcs=false
WORKDIR /src
COPY Makefile ./
RUN make debian-packages

# What changes seldom comes first, so that its layer is kept: the Rust half takes minutes.
COPY go.mod go.sum ./
COPY scripts scripts
RUN make prerequisites native

COPY . .
# The image runs on other machines than the one that built it: the baseline is AVX2 and FMA (2013 and newer), not
# "native". On arm64: --build-arg HONE_MARCH=armv8.2-a+fp16+dotprod
ARG HONE_MARCH=x86-64-v3
RUN make build HONE_MARCH=$HONE_MARCH

FROM debian:bookworm-slim
# OpenMP's run-time, which the slim image lacks. /usr/lib is where the loader looks by itself.
COPY --from=build /usr/lib/*-linux-gnu/libgomp.so.1* /usr/lib/
# The default model comes from the Hugging Face hub, over TLS.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /src/bin/hone /usr/local/bin/hone
# A new volume takes the owner of this directory.
COPY --from=build --chown=10001:10001 /src/examples/mcq /data/examples
COPY --from=build /src/LICENSE /src/THIRD_PARTY.md /usr/share/doc/hone/
USER 10001:10001
# Every interface of the container: which of the machine's ports lead here is said by `docker run -p`. It asks for an API key.
ENV HOME=/data HONE_HOME=/data HONE_HOST=0.0.0.0 HONE_PORT=8080
VOLUME /data
EXPOSE 8080
# bash speaks TCP by itself, so the image needs no curl. /health answers 200 when the server takes requests.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/$HONE_PORT && printf 'GET /health HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n' >&3 && head -n 1 <&3 | grep -q ' 200 '"]
# Children are reaped by hone itself; SIGTERM stops it with a resume state of the running job.
STOPSIGNAL SIGTERM
ENTRYPOINT ["hone"]
CMD ["serve"]
