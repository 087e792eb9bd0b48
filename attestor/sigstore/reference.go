package sigstore

import (
	"encoding/hex"
	"errors"
	"net"
	"strconv"
	"strings"
)

const (
	// maxImage bounds an image id in bytes. Registries allow a name of 255.
	maxImage = 1024

	dockerHub     = "docker.io"
	dockerHubHost = "registry-1.docker.io" // which serves the API of docker.io
)

// reference names an image by its content.
type reference struct {
	registry   string // host or host:port, as image names have it
	repository string
	digest     string // SHA-256 in hexadecimal
}

func (r reference) String() string { return r.registry + "/" + r.repository + "@sha256:" + r.digest }

// host is where the registry's API is.
func (r reference) host() string {
	if r.registry == dockerHub {
		return dockerHubHost
	}
	return r.registry
}

// parseReference reads an image id. Names without a registry are those of
// Docker Hub. The grammar is that of the OCI distribution specification.
func parseReference(image string) (reference, error) {
	if len(image) > maxImage {
		return reference{}, errors.New("its id is longer than 1024 bytes")
	}
	// cri-dockerd and old kubelets write how the image came.
	image = strings.TrimPrefix(image, "docker-pullable://")
	name, digest, ok := strings.Cut(image, "@")
	if !ok {
		return reference{}, errors.New("its id names no repository and digest: only an image that was pulled from a registry can have signatures there")
	}
	sum, ok := strings.CutPrefix(digest, "sha256:")
	if raw, err := hex.DecodeString(sum); !ok || err != nil || len(raw) != 32 || strings.ToLower(sum) != sum {
		return reference{}, errors.New("its digest is not sha256: and 64 hexadecimal digits")
	}
	host, path, ok := strings.Cut(name, "/")
	if !ok || !strings.ContainsAny(host, ".:") && host != "localhost" {
		host, path = dockerHub, name
	}
	host = canonicalRegistry(host)
	if host == dockerHub && !strings.Contains(path, "/") {
		path = "library/" + path
	}
	// A tag may stand before the digest, which alone counts.
	if i := strings.LastIndexByte(path, ':'); i > strings.LastIndexByte(path, '/') {
		if !validTag(path[i+1:]) {
			return reference{}, errors.New("its tag is malformed")
		}
		path = path[:i]
	}
	if !validHost(host) {
		return reference{}, errors.New("its registry is not a host or host:port")
	}
	if !validRepository(path) {
		return reference{}, errors.New("its repository is malformed")
	}
	return reference{registry: host, repository: path, digest: sum}, nil
}

// canonicalRegistry gives Docker Hub, which has two names, one.
func canonicalRegistry(host string) string {
	host = strings.ToLower(host)
	if host == "index.docker.io" {
		return dockerHub
	}
	return host
}

func validHost(s string) bool {
	host := s
	if h, port, err := net.SplitHostPort(s); err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return false
		}
		host = h
	} else if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		host = s[1 : len(s)-1]
	} else if strings.Contains(s, ":") {
		return false
	}
	if strings.Contains(host, ":") {
		return net.ParseIP(host) != nil
	}
	if host == "" || len(host) > 253 {
		return false
	}
	for label := range strings.SplitSeq(host, ".") {
		if label == "" || len(label) > 63 || !all(label, func(c byte) bool { return lowerOrDigit(c) || c == '-' }) {
			return false
		}
	}
	return true
}

func validRepository(s string) bool {
	if s == "" || len(s) > 255 {
		return false
	}
	for part := range strings.SplitSeq(s, "/") {
		if part == "" || !lowerOrDigit(part[0]) || !lowerOrDigit(part[len(part)-1]) || strings.Contains(part, "..") ||
			!all(part, func(c byte) bool { return lowerOrDigit(c) || c == '.' || c == '_' || c == '-' }) {
			return false
		}
	}
	return true
}

func validTag(s string) bool {
	return s != "" && len(s) <= 128 && all(s, func(c byte) bool {
		return lowerOrDigit(c) || c >= 'A' && c <= 'Z' || c == '.' || c == '_' || c == '-'
	})
}

func lowerOrDigit(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }

func all(s string, is func(byte) bool) bool {
	for i := range len(s) {
		if !is(s[i]) {
			return false
		}
	}
	return true
}
