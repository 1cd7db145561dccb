# syntax=docker/dockerfile:1

# The builder runs on the machine's own architecture and compiles for the target's; nothing is emulated. The image says GOTOOLCHAIN=local,
# and may be older than the Go that go.mod names.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
ARG TARGETOS TARGETARCH
WORKDIR /src
RUN --mount=type=bind,target=. \
    --mount=type=cache,target=/go/pkg/mod \
    --mount=type=cache,target=/root/.cache/go-build \
    GOTOOLCHAIN=auto CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags='-s -w' -o /out/idempotent-orders .

# The program is static and needs no shell. It does need what distroless brings in 2 MB and scratch lacks: root
# certificates for TLS to the stores, a user that is not root (65532) with a home folder, and /tmp.
FROM gcr.io/distroless/static:nonroot
COPY --from=build /out/idempotent-orders /usr/local/bin/idempotent-orders
EXPOSE 8080
# Without a command everything runs in one process; `server`, `worker`, `consumer` and `migrate up` are commands.
ENTRYPOINT ["/usr/local/bin/idempotent-orders"]
