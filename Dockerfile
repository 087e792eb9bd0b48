# The image of agent, proxy and CSI driver: one static program and the public
# CAs, nothing else.
#
#   docker buildx build --platform linux/amd64,linux/arm64 \
#     --build-arg VERSION=$(git describe --tags --always) -t registry.example/narthex:1 --push .
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
# Set by the builder, for the platform the image is for.
ARG TARGETOS=linux
ARG TARGETARCH
ARG VERSION=unknown
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o /narthex ./cmd/narthex

FROM scratch
ARG VERSION=unknown
LABEL org.opencontainers.image.title="Narthex" \
      org.opencontainers.image.description="Workload identity and mutual TLS by SPIFFE ID" \
      org.opencontainers.image.source="https://github.com/narthex-id/narthex" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION"
# For what is asked of servers with a public certificate. SPIRE Server and the
# kubelet are not among them.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /narthex /narthex
# The proxy needs no other. The agent has to be root without capabilities but
# SYS_PTRACE, and the CSI driver privileged root: their manifests say so.
USER 65532:65532
ENTRYPOINT ["/narthex"]
