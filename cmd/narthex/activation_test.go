package main

import (
	"net"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestSameAddress(t *testing.T) {
	tcp := func(ip string, port int) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: port} }
	for _, c := range []struct {
		have net.Addr
		bind string
		want bool
	}{
		{tcp("127.0.0.1", 80), "127.0.0.1:80", true},
		{tcp("127.0.0.1", 80), "127.0.0.1:81", false},
		{tcp("127.0.0.1", 80), "127.0.0.2:80", false},
		{tcp("127.0.0.1", 80), "localhost:80", false}, // which may be another address by now
		{tcp("::", 80), ":80", true},
		{tcp("0.0.0.0", 80), ":80", true},
		{tcp("0.0.0.0", 80), "0.0.0.0:80", true},
		{tcp("::", 80), "[::]:80", true},
		{tcp("::", 80), "0.0.0.0:80", false}, // it would take more than was asked for
		{tcp("127.0.0.1", 80), ":80", false},
		{&net.UnixAddr{Net: "unix", Name: "/run/a"}, "unix:/run/a", true},
		{&net.UnixAddr{Net: "unix", Name: "/run/a"}, "unix:/run/b", false},
		{&net.UnixAddr{Net: "unix", Name: "/run/a"}, "127.0.0.1:80", false},
		{tcp("127.0.0.1", 80), "unix:/run/a", false},
	} {
		if got := sameAddress(c.have, c.bind); got != c.want {
			t.Errorf("%v is %s: %v, want %v", c.have, c.bind, got, c.want)
		}
	}
}

// TestStatusIsOneLine: a peer chooses some of what is in it, and systemd reads
// an assignment in each line.
func TestStatusIsOneLine(t *testing.T) {
	got := statusState("a\nMAINPID=1\x00" + strings.Repeat("é", 200))
	if strings.ContainsAny(got, "\n\x00") || !strings.HasPrefix(got, "STATUS=a MAINPID=1 ") || len(got) > 210 || !utf8.ValidString(got) {
		t.Errorf("%q", got)
	}
}
