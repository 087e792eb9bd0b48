// Package importer turns the configuration of a spire-agent into the
// narthex.yaml that does the same:
//
//	r, err := importer.SpireAgent("agent.conf", data, importer.Options{Dir: "/opt/spire", DataDir: "/var/lib/narthex"})
//	if err != nil { … } // the file cannot be read as HCL
//	os.Stdout.Write(r.Text)
//
// Every key of the file is accounted for: it is carried, or it says what
// happens anyway, or it is in Notes with the reason and what to do. Keys of
// narthex.yaml that this version does not have are asked of package config, so
// that what another version can carry is carried by that one. Secrets are never
// in the text: Result has them apart.
//
// The keys are those of spire-agent 1.15 (cmd/spire-agent/cli/run and
// pkg/agent/plugin of spiffe/spire).
package importer

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/narthex-id/narthex/internal/config"
)

// Options say what the file alone does not.
type Options struct {
	// Dir is the working directory of spire-agent, an absolute path: its
	// relative paths are relative to that.
	Dir string
	// DirGiven says that Dir is somebody's word and no guess, which is noted.
	DirGiven bool
	// DataDir is the data_dir of the new agent.
	DataDir string
	// Getenv, where it is set, expands $VARIABLE and ${VARIABLE} in the file
	// before it is read, as spire-agent's flag -expandEnv does.
	Getenv func(string) string
}

// Result is what an import gave.
type Result struct {
	// Text is narthex.yaml. What could not be carried is in it as comments.
	Text []byte
	// Notes are what a person has to know, by line.
	Notes []Note
	// Secrets belong into files beside narthex.yaml, which names them.
	Secrets []Secret
}

// Complete reports whether everything was carried.
func (r *Result) Complete() bool {
	return !slices.ContainsFunc(r.Notes, func(n Note) bool { return n.Lost })
}

// Note is one thing to know of a key.
type Note struct {
	File         string
	Line, Column int    // from 1
	Key          string // like agent.log_file
	Problem      string // why, and what to do
	Lost         bool   // what the key asks for is not in the result
}

// String returns "file:line:column: key: problem".
func (n *Note) String() string {
	return fmt.Sprintf("%s:%d:%d: %s: %s", n.File, n.Line, n.Column, n.Key, n.Problem)
}

// Secret is a secret of the file.
type Secret struct {
	Name  string // of the file, without a directory
	Key   string // that it stood under
	Value config.Secret
}

const (
	// maxNotes bounds what a hopeless file can fill a screen with.
	maxNotes = 200
	// maxItems bounds the blocks of a list: brokers, identities, registries.
	maxItems = 1000
)

// draft gathers what becomes a Result.
type draft struct {
	file    string
	options Options
	out     document
	notes   []Note
	dropped bool // notes beyond maxNotes
	secrets []Secret
	dir     bool // it was said what relative paths are relative to
}

// SpireAgent imports the configuration of a spire-agent, HCL or JSON of at
// most MaxSize bytes. The name stands in messages; of other files, none is
// opened. The error says where the file cannot be read.
func SpireAgent(name string, data []byte, o Options) (*Result, error) {
	if len(data) > MaxSize { // before the environment makes more of it
		return nil, fmt.Errorf("%s: larger than %d bytes; is it a spire-agent's configuration?", name, MaxSize)
	}
	d := &draft{file: name, options: o}
	if o.Getenv != nil {
		data = []byte(os.Expand(string(data), func(key string) string {
			if key == "$" {
				return "$"
			}
			return o.Getenv(key)
		}))
	}
	root, at, err := read(data)
	if err != nil {
		return nil, fmt.Errorf("%s:%d:%d: %w", name, at.line, at.column, err)
	}
	f := d.fieldsOf("", pair{value: root})
	if f.has("server") && !f.has("agent") {
		return nil, fmt.Errorf("%s: has a server block and no agent block: it is a spire-server's configuration; give the spire-agent's", name)
	}
	if !f.has("agent") && !f.has("plugins") {
		return nil, fmt.Errorf("%s: neither an agent nor a plugins block in it; is it a spire-agent's configuration?", name)
	}
	d.all(f)
	return d.result(), nil
}

// all carries the file over. The order is that of the result.
func (d *draft) all(f *fields) {
	agent := f.fields("agent")
	p := d.plugins(f.all("plugins"))
	d.node(agent)
	d.server(agent)
	d.nodeAttestor(agent, p)
	d.keyManager(agent, p)
	d.workloadAttestors(p)
	d.otherPlugins(p)
	d.sockets(agent)
	d.svids(agent)
	d.experimental(agent.fields("experimental"))
	d.log(agent)
	d.profiling(agent)
	agent.rest()
	d.telemetry(f.fields("telemetry"))
	d.health(f.fields("health_checks"))
	f.rest()
}

// lose says that what a key asks for is not in the result.
func (d *draft) lose(at place, key, format string, args ...any) {
	d.add(Note{Key: key, Problem: fmt.Sprintf(format, args...), Lost: true}, at)
}

// note says what to know of a key that is carried.
func (d *draft) note(at place, key, format string, args ...any) {
	d.add(Note{Key: key, Problem: fmt.Sprintf(format, args...)}, at)
}

func (d *draft) add(n Note, at place) {
	if len(d.notes) == maxNotes {
		d.dropped = true
		return
	}
	n.File, n.Line, n.Column = d.file, max(at.line, 1), max(at.column, 1)
	d.notes = append(d.notes, n)
}

// set puts a key into the result. One that this version has not is lost.
func (d *draft) set(f *fields, from, key string, v any) {
	if !config.Knows(indices.ReplaceAllString(key, "[]")) {
		d.lose(f.at(from), f.key(from), "%s is not supported by this version of Narthex", indices.ReplaceAllString(key, ""))
		return
	}
	d.out.set(key, v)
}

var indices = regexp.MustCompile(`\[\d+\]`)

// setText, setPath and setFlag carry a key where it says something.
func (d *draft) setText(f *fields, from, key string) {
	if s := f.text(from); s != "" {
		d.set(f, from, key, s)
	}
}

func (d *draft) setPath(f *fields, from, key string) {
	if s := f.text(from); s != "" {
		d.set(f, from, key, d.path(f, from, s))
	}
}

func (d *draft) setFlag(f *fields, from, key string) {
	if f.flag(from) {
		d.set(f, from, key, true)
	}
}

// path makes a path absolute, from where spire-agent would see it.
func (d *draft) path(f *fields, from, path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	if !d.dir && !d.options.DirGiven {
		d.dir = true
		d.note(f.at(from), f.key(from), "relative paths are taken from %s: give --dir where spire-agent is started in another directory", d.options.Dir)
	}
	return filepath.Join(d.options.Dir, path)
}

// secret keeps a secret out of the text, and returns the name of its file.
func (d *draft) secret(f *fields, from, name, value string) string {
	d.secrets = append(d.secrets, Secret{Name: name, Key: f.key(from), Value: config.Secret(value)})
	return name
}

// result ends the import.
func (d *draft) result() *Result {
	slices.SortStableFunc(d.notes, func(a, b Note) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	if d.dropped {
		d.notes = append(d.notes, Note{File: d.file, Line: 1, Column: 1, Key: "…", Problem: "there is more of this kind", Lost: true})
	}
	return &Result{Text: d.write(), Notes: d.notes, Secrets: d.secrets}
}

// write returns the text of narthex.yaml.
func (d *draft) write() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "# Imported from %s of a spire-agent.\n", clip(filepath.Base(d.file)))
	for _, lost := range []bool{true, false} {
		title := "To know:"
		if lost {
			title = "Not carried over:"
		}
		for i := range d.notes {
			if d.notes[i].Lost != lost {
				continue
			}
			if title != "" {
				fmt.Fprintf(&b, "#\n# %s\n", title)
				title = ""
			}
			fmt.Fprintf(&b, "#   %s\n", strings.ReplaceAll(d.notes[i].String(), "\n", " "))
		}
	}
	b.WriteString("\n")
	d.out.write(&b)
	return []byte(b.String())
}

// Check reads the text as Narthex will, and returns what is wrong with it: the
// import of a file that spire-agent would refuse may come to nothing better.
func (r *Result) Check(name string) []config.Finding {
	c, err := config.Parse(name, r.Text)
	if err == nil {
		err = c.ForAgent()
	}
	var found *config.Error
	if errors.As(err, &found) {
		return found.Findings
	}
	return nil
}
