package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/proxy"
	"github.com/narthex-id/narthex/proxy/http2"
)

// TestCostsOfHTTP2 holds the numbers of docs/http.md against those of the code.
func TestCostsOfHTTP2(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "http.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## HTTP/2: what a peer may cost\n")
	section, _, _ = strings.Cut(section, "\n## ")
	section = strings.Join(strings.Fields(section), " ")
	const all = http2.Patience + http2.CostReset*http2.MaxStreams
	counted := func(cost int) string { return fmt.Sprintf("| %d | %s |", cost, thousands(all/cost)) }
	for _, row := range []struct {
		about string // how it begins
		want  []string
	}{
		{"**patience** of its connection", []string{
			thousands(http2.Patience), fmt.Sprintf("and %d for each", http2.CostReset), fmt.Sprintf("`http.max_streams`, %d)", http2.MaxStreams),
			"makes " + thousands(all), fmt.Sprintf("gains %d a second", http2.PatienceASecond),
		}},
		{"| rapid reset", []string{counted(http2.CostReset)}},
		{"| resets that we are made to send", []string{counted(http2.CostReset)}},
		{"| too many streams", []string{counted(http2.CostReset)}},
		{"| HPACK bomb", []string{counted(http2.CostLarge), kib(http2.MaxHead) + " or " + fmt.Sprint(http2.MaxFields, " fields")}},
		{"| PING", []string{counted(http2.CostFrame)}},
		{"| SETTINGS", []string{counted(http2.CostSettings)}},
		{"| PRIORITY", []string{counted(http2.CostFrame)}},
		{"| empty frames", []string{counted(http2.CostFrame)}},
		{"| data dribble", []string{counted(http2.CostFrame), "less than " + kib(http2.SmallUpdate)}},
		{"| unknown frames", []string{counted(http2.CostFrame)}},
		{"| CONTINUATION without end", []string{fmt.Sprint(http2.MaxFragments, " frames and ", kib(http2.MaxBlock))}},
		{"| a frame that is large", []string{kib(http2.MaxFrame)}},
		{"| answers to PING and SETTINGS", []string{kib(http2.MaxControl) + " wait"}},
		{"| content that is not read", []string{
			kib(http2.MaxUnsent) + " wait on", "of each stream " + kib(http2.FirstWindow), fmt.Sprint(http2.MaxWide, " streams"), "hold " + kib(http2.StreamWindow),
		}},
		{"| an answer that is taken slowly", []string{"each " + kib(proxy.SlowestTaken)}},
		{"| content that the service does not read", []string{kib(http2.StreamWindow) + " of a stream, " + fmt.Sprint(http2.Window>>20, " MiB of a connection")}},
	} {
		_, after, ok := strings.Cut(section, row.about)
		if after, _, _ = strings.Cut(after, " | | "); !ok {
			t.Errorf("nothing is said of %q", row.about)
		}
		for _, want := range row.want {
			if !strings.Contains(after+" |", want) {
				t.Errorf("%s: want %q, as the code has it", row.about, want)
			}
		}
	}
}

func kib(n int) string { return fmt.Sprint(n>>10, " KiB") }

// thousands writes a number of up to six digits as the pages do.
func thousands(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%d,%03d", n/1000, n%1000)
}
