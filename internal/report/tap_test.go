package report

import (
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// tapPoint is a test point as a harness reads it.
type tapPoint struct {
	ok          bool
	description string
	directive   string
	diagnostic  map[string]any
}

// parseTAP reads TAP 14 strictly: what a harness may let pass is an error too.
func parseTAP(t *testing.T, text string) []tapPoint {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) < 2 || lines[0] != "TAP version 14" {
		t.Fatalf("no version and plan:\n%s", text)
	}
	plan, reason, _ := strings.Cut(strings.TrimPrefix(lines[1], "1.."), " # ")
	planned, err := strconv.Atoi(plan)
	if err != nil || !strings.HasPrefix(lines[1], "1..") || (planned == 0) != (reason != "") {
		t.Fatalf("plan %q: %v", lines[1], err)
	}
	var points []tapPoint
	for rest := lines[2:]; len(rest) > 0; {
		p := tapPointOf(t, rest[0], len(points)+1)
		rest = rest[1:]
		if len(rest) > 0 && rest[0] == "  ---" {
			end := 1
			for end < len(rest) && rest[end] != "  ..." {
				if !strings.HasPrefix(rest[end], "  ") {
					t.Fatalf("YAML block with %q:\n%s", rest[end], text)
				}
				end++
			}
			if end == len(rest) {
				t.Fatalf("a YAML block does not end:\n%s", text)
			}
			if err := yaml.Unmarshal([]byte(strings.Join(rest[1:end], "\n")), &p.diagnostic); err != nil {
				t.Fatalf("%v:\n%s", err, text)
			}
			rest = rest[end+1:]
		}
		points = append(points, p)
	}
	if len(points) != planned {
		t.Fatalf("%d planned, %d there:\n%s", planned, len(points), text)
	}
	return points
}

// tapPointOf reads "ok 1 - description # directive".
func tapPointOf(t *testing.T, line string, n int) (p tapPoint) {
	t.Helper()
	rest, failed := strings.CutPrefix(line, "not ")
	p.ok = !failed
	rest, found := strings.CutPrefix(rest, "ok "+strconv.Itoa(n)+" - ")
	if !found {
		t.Fatalf("no test point %d: %q", n, line)
	}
	var b strings.Builder
	for i := 0; i < len(rest); i++ {
		switch c := rest[i]; {
		case c == '\\' && i+1 < len(rest) && (rest[i+1] == '\\' || rest[i+1] == '#'):
			i++
			b.WriteByte(rest[i])
		case c == '#':
			p.description, p.directive = b.String(), rest[i:]
			return p
		default:
			b.WriteByte(c)
		}
	}
	p.description = b.String()
	return p
}

func TestTAP(t *testing.T) {
	t.Parallel()
	want := `TAP version 14
1..4
ok 1 - web reads orders
not ok 2 - web writes \# SKIP
  ---
  message: "want deny, got allow by rule \"a\\b\""
  severity: fail
  failures: |
    want deny, got allow by rule "a\b"
    shadow: want [x]\x1b, got []
  at:
    file: "shop.yaml"
    line: 14
    column: 5
  duration_ms: 2.000
  ...
not ok 3 - web reads orders
  ---
  message: "failed"
  severity: fail
  at:
    file: "shop.yaml"
    line: 16
    column: 5
  duration_ms: 0.000
  ...
ok 4 - web reads orders
`
	got := written(t, sampleRun().Write, "tap")
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	points := parseTAP(t, got)
	if points[1].ok || points[1].description != "web writes # SKIP" || points[1].directive != "" {
		t.Errorf("%+v", points[1])
	}
	at := map[string]any{"file": "shop.yaml", "line": uint64(14), "column": uint64(5)}
	failures := "want deny, got allow by rule \"a\\b\"\nshadow: want [x]\\x1b, got []\n"
	if !reflect.DeepEqual(points[1].diagnostic["at"], at) || points[1].diagnostic["failures"] != failures {
		t.Errorf("%#v", points[1].diagnostic)
	}
	parseTAP(t, written(t, (&TestRun{}).Write, "tap"))
}

func TestTAPText(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "plain", "# SKIP", `\# TODO`, `\`, `\\#`, "a\n# b", "12 monkeys", " - dash"} {
		points := parseTAP(t, "TAP version 14\n1..1\nok 1 - "+tapText(name)+"\n")
		if points[0].description != printable(name) || points[0].directive != "" {
			t.Errorf("%q: read back as %+v", name, points[0])
		}
	}
}
