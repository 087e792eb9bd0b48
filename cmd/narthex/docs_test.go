package main

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/proxy/policy"
)

// yamlBlocks returns the fenced YAML examples of a page, in their order.
func yamlBlocks(t *testing.T, page string) []string {
	t.Helper()
	text := readPage(t, page)
	var blocks []string
	for _, m := range regexp.MustCompile("(?ms)^```yaml\n(.*?)^```").FindAllStringSubmatch(text, -1) {
		blocks = append(blocks, m[1])
	}
	if fences := strings.Count(text, "```yaml"); len(blocks) != fences {
		t.Errorf("%s: %d YAML examples were found, it has %d", page, len(blocks), fences)
	}
	return blocks
}

// pages returns the README and all pages below docs and deploy.
func pages(t *testing.T) []string {
	t.Helper()
	root := filepath.Join("..", "..")
	found := []string{"README.md"}
	for _, dir := range []string{"docs", "deploy"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(file string, _ fs.DirEntry, err error) error {
			if err == nil && strings.HasSuffix(file, ".md") {
				file, err = filepath.Rel(root, file)
				found = append(found, file)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}

// TestLinks follows every link from one page to another, to its heading.
func TestLinks(t *testing.T) {
	for _, page := range pages(t) {
		text := readPage(t, page)
		for _, m := range regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(text, -1) {
			to, heading, _ := strings.Cut(m[1], "#")
			if strings.Contains(to, "://") {
				continue
			}
			target := page
			if to != "" {
				target = filepath.Join(filepath.Dir(page), to)
			}
			if _, err := os.Stat(filepath.Join("..", "..", target)); err != nil {
				t.Errorf("%s: %s leads nowhere: %v", page, m[1], err)
			} else if heading != "" && !slices.Contains(headings(readPage(t, target)), heading) {
				t.Errorf("%s: %s: no such heading", page, m[1])
			}
		}
	}
}

// TestDocumentedTestsExist looks for every test that a page names, in the room
// that it names before it.
func TestDocumentedTestsExist(t *testing.T) {
	for _, page := range pages(t) {
		for line := range strings.Lines(readPage(t, page)) {
			room := ""
			for _, m := range regexp.MustCompile("`([a-z0-9/]+)`|\\b((?:Test|Fuzz)[A-Z][A-Za-z0-9]*)").FindAllStringSubmatch(line, -1) {
				switch {
				case m[1] != "":
					if tests, _ := filepath.Glob(filepath.Join("..", "..", m[1], "*_test.go")); len(tests) > 0 {
						room = m[1]
					}
				case room != "" && !hasTest(t, room, m[2]):
					t.Errorf("%s: %s has no %s", page, room, m[2])
				case room == "" && slices.Contains([]string{"docs/security.md", "docs/conformance.md"}, page):
					t.Errorf("%s: %s is in no room", page, m[2])
				}
			}
		}
	}
}

func hasTest(t *testing.T, room, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("..", "..", room, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "\nfunc "+name+"(") {
			return true
		}
	}
	return false
}

func readPage(t *testing.T, page string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", page))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// headings returns the names by which a page's headings are linked to.
func headings(page string) (names []string) {
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(page, -1) {
		name := regexp.MustCompile(`[^\w\- ]`).ReplaceAllString(strings.ToLower(m[1]), "")
		names = append(names, strings.ReplaceAll(name, " ", "-"))
	}
	return names
}

// TestExamplesAreGood reads every YAML example of the docs as the product
// does.
func TestExamplesAreGood(t *testing.T) {
	for _, page := range pages(t) {
		for _, block := range yamlBlocks(t, page) {
			var err error
			switch {
			case strings.Contains(block, "\nentries:"):
				continue // read by TestWalkthrough
			case page == "deploy/helm/narthex/README.md":
				continue // read by TestReadmeOfTheChart of integration/deploy
			case strings.HasPrefix(block, "# envoy.yaml"):
				continue // read by TestEnvoyExamples
			case page == "docs/ci.md":
				continue // read by TestPipelines
			case slices.Contains(rulePages, page):
				continue // read by TestRuleExamples
			case strings.HasPrefix(block, "version:") || strings.Contains(block, "\nversion:"):
				_, err = policy.Parse(page, []byte(block))
			default:
				_, err = config.Parse(page, []byte(block))
			}
			if err != nil {
				t.Errorf("%s:\n%s\n%v", page, block, err)
			}
		}
	}
}

// TestWalkthrough does what docs/proxy.md tells a reader to do.
func TestWalkthrough(t *testing.T) {
	dir, err := os.MkdirTemp("", "walk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ports := map[string]string{}
	service := httpService(t)
	for _, documented := range []string{"18081", "18443", "15001"} {
		ports[documented] = freePort(t)
	}
	ports["18080"] = service
	ports["9901"] = "0" // of agent and proxy, which here are not one program
	for _, block := range yamlBlocks(t, "docs/proxy.md") {
		name := regexp.MustCompile(`^# ([a-z]+\.yaml)`).FindStringSubmatch(block)
		if name == nil {
			continue // it shows a key, and is no file of the walk
		}
		block = strings.NewReplacer("UID", fmt.Sprint(os.Getuid()), "/tmp/narthex-walk", dir).Replace(block)
		for documented, port := range ports {
			block = strings.ReplaceAll(block, ":"+documented, ":"+port)
		}
		if err := os.WriteFile(filepath.Join(dir, name[1]), []byte(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	start(t, dir, "dev-server", "-f", "entries.yaml", "--out", "dev")
	waitFor(t, "dev/join-token", func() bool { _, err := os.Stat(filepath.Join(dir, "dev", "join-token")); return err == nil })
	start(t, dir, "agent", "-c", "narthex.yaml")
	start(t, dir, "proxy", "-c", "narthex.yaml")
	waitFor(t, "an allowed call", func() bool { return get(ports["15001"]) == "hello" })

	rules := filepath.Join(dir, "rules.yaml")
	text, err := os.ReadFile(rules)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(rules, []byte(strings.Replace(string(text), "effect: allow", "effect: deny", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a refused call", func() bool { return get(ports["15001"]) == "" })

	// docs/moving-over.md, from these refusing rules on.
	config := filepath.Join(dir, "narthex.yaml")
	text, err = os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	target := "target: 127.0.0.1:" + service + "\n"
	mode := func(lines string) {
		if err := os.WriteFile(config, []byte(strings.Replace(string(text), target, target+lines, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mode("      mode: permissive\n      enforcement: audit\n")
	waitFor(t, "plaintext in an audit", func() bool { return get(ports["18443"]) == "hello" })
	mode("      mode: permissive\n")
	waitFor(t, "plaintext without a rule is refused", func() bool { return get(ports["18443"]) == "" })
	for _, block := range yamlBlocks(t, "docs/moving-over.md") {
		if strings.Contains(block, "plaintext-for-now") {
			if err := os.WriteFile(rules, []byte(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	waitFor(t, "plaintext with its rule", func() bool { return get(ports["18443"]) == "hello" && get(ports["15001"]) == "hello" })
	mode("")
	waitFor(t, "plaintext on a strict listener is refused", func() bool { return get(ports["18443"]) == "" && get(ports["15001"]) == "hello" })
}

func httpService(t *testing.T) (port string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") })}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return port
}

func freePort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func get(port string) string {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://127.0.0.1:" + port + "/")
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return ""
	}
	return string(body)
}

// start runs this program with a command, until the test ends.
func start(t *testing.T, dir string, args ...string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, self)
	cmd.Args = append([]string{"narthex"}, args...) // what the test binary goes by
	cmd.Dir = dir
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("narthex %s:\n%s", args[0], out.String())
		}
	})
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("not in time: " + what)
		}
		<-tick.C
	}
}
