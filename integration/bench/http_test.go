package main

import (
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/narthex-id/narthex/integration/internal/figures"
)

// What the client asks for is what the backend answers, one after another on
// one connection.
func TestRequestsToTheBackend(t *testing.T) {
	b, err := startBackend()
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	c, err := net.Dial("tcp", b.address())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	for range 2 {
		for _, test := range []struct{ up, down int }{{0, kib}, {kib, 0}, {0, 64 * kib}, {64 * kib, 0}, {0, mib}, {mib, 0}} {
			if err := exchange(c, request(test.up, test.down), make([]byte, 64*kib), test.down); err != nil {
				t.Fatalf("%d bytes up, %d down: %v", test.up, test.down, err)
			}
		}
	}
}

// answering is a connection whose far end says the same whatever it is sent.
type answering struct {
	net.Conn
	io.Reader
}

func (a *answering) Read(b []byte) (int, error)  { return a.Reader.Read(b) }
func (a *answering) Write(b []byte) (int, error) { return len(b), nil }

func TestExchangeReadsAnswers(t *testing.T) {
	whole := string(response(kib))
	for _, test := range []struct{ name, answer, want string }{
		{"whole", whole, ""},
		{"another status", strings.Replace(whole, "200 OK", "403 Forbidden", 1), "HTTP/1.1 403"},
		{"too long", whole + "x", "not"},
		{"cut short", whole[:len(whole)-1], "EOF"},
		{"a head without end", "HTTP/1.1 200 OK\r\n" + strings.Repeat("x: y\r\n", kib), "larger than"},
	} {
		for name, reader := range map[string]io.Reader{
			"at once": strings.NewReader(test.answer), "byte by byte": iotest.OneByteReader(strings.NewReader(test.answer)),
		} {
			if name == "byte by byte" && test.name == "too long" {
				continue // what is behind the answer is read with the next one
			}
			err := exchange(&answering{Reader: reader}, nil, make([]byte, 4*kib), kib)
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s, %s: %v", test.name, name, err)
			}
		}
	}
}

func TestNamedRows(t *testing.T) {
	for _, test := range []struct {
		names string
		want  int
		first string
	}{
		{"", 0, ""}, // all of them
		{"handshake", 1, "handshake"},
		{"http-*", 10, "http-1"},
		{"h2-*", 17, "h2-1x1"},
		{"echo,http-1*", 3, "echo"},
		{"http", 0, ""},
		{"x*", 0, ""},
	} {
		var names []string
		if test.names != "" {
			names = strings.Split(test.names, ",")
		}
		ids, err := namedRows(names)
		if (err != nil) != (test.want == 0 && names != nil) || len(ids) != test.want || test.want > 0 && ids[0] != test.first {
			t.Errorf("%q: %v, %v", test.names, ids, err)
		}
		if names == nil && ids != nil {
			t.Error("nothing named is all of them, which is nil")
		}
	}
}

// A run of some rows renews the tables it has measured whole, and those alone.
func TestSplice(t *testing.T) {
	measured := func(title string, but int, sides ...string) *report {
		r := &report{results: results{}, versions: map[string]string{ours: "narthex new"}}
		for _, table := range tables {
			if table.title != title {
				continue
			}
			for _, row := range table.rows[but:] {
				r.results[row.id] = map[string]figures.Series{ours: {1}}
			}
		}
		r.options.sides = sides
		return r
	}
	const page = "# Benchmarks\n\n## The proxy\n\nfirst\n\n## HTTP\n\nold\n\n## The agent\n\nlast\n"
	for _, test := range []struct {
		name, page string
		report     *report
		titles     []string
	}{
		{"in its place", page, measured("HTTP", 0), []string{"HTTP"}},
		{"new", strings.Replace(page, "## HTTP\n\nold\n\n", "", 1), measured("HTTP", 0), []string{"HTTP"}},
		{"not whole", page, measured("HTTP", 1), nil},
		{"not all sides", page, measured("HTTP", 0, ours), nil},
		{"the last", page, measured("The agent", 0), []string{"The agent"}},
	} {
		titles, spliced := test.report.splice(test.page)
		if !slices.Equal(titles, test.titles) {
			t.Errorf("%s: %v renewed", test.name, titles)
		}
		if titles == nil && spliced != test.page {
			t.Errorf("%s: the page has changed", test.name)
		}
		var heads []string
		for line := range strings.Lines(spliced) {
			if head, ok := strings.CutPrefix(line, "## "); ok {
				heads = append(heads, strings.TrimSpace(head))
			}
		}
		if want := []string{"The proxy", "HTTP", "The agent"}; !slices.Equal(heads, want) {
			t.Errorf("%s: tables %v, want %v", test.name, heads, want)
		}
		for _, title := range titles {
			_, table, _ := strings.Cut(spliced, "## "+title+"\n")
			if table, _, _ = strings.Cut(table, "\n## "); !strings.Contains(table, "narthex new") || strings.Contains(table, "\nold\n") || strings.Contains(table, "\nlast\n") {
				t.Errorf("%s: %.200s", test.name, table)
			}
		}
	}
}
