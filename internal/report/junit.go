package report

import (
	"encoding/xml"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
)

// What of JUnit's XML is written. There is no standard; these are the elements
// and attributes that Ant, Surefire, Jenkins and GitLab agree on. Jenkins'
// xUnit plug-in refuses a file with any other.
type (
	junitSuites struct {
		XMLName  xml.Name     `xml:"testsuites"`
		Tests    int          `xml:"tests,attr"`
		Failures int          `xml:"failures,attr"`
		Errors   int          `xml:"errors,attr"`
		Time     string       `xml:"time,attr"`
		Suites   []junitSuite `xml:"testsuite"`
	}
	junitSuite struct {
		Name     string      `xml:"name,attr"`
		Tests    int         `xml:"tests,attr"`
		Failures int         `xml:"failures,attr"`
		Errors   int         `xml:"errors,attr"`
		Skipped  int         `xml:"skipped,attr"`
		Time     string      `xml:"time,attr"`
		Cases    []junitCase `xml:"testcase"`

		took time.Duration // of all cases
	}
	junitCase struct {
		Class   string        `xml:"classname,attr"`
		Name    string        `xml:"name,attr"`
		Time    string        `xml:"time,attr"`
		Failure *junitFailure `xml:"failure"`
		Out     *junitOut     `xml:"system-out"`
	}
	// junitFailure is the one failure of a case, which says all that failed
	// in its text: most readers show no second one.
	junitFailure struct {
		Message string `xml:"message,attr"`
		Type    string `xml:"type,attr"`
		Text    string `xml:",cdata"`
	}
	junitOut struct {
		Text string `xml:",cdata"`
	}
)

// checkSuite names the test suite of a check, and the case of what is about no
// file.
const checkSuite = "narthex check"

// junit writes one test suite with a case for each file, which fails for what
// was found in it. Notes are told and let it pass.
func (f *Findings) junit(w io.Writer) error {
	var files []string
	for _, name := range f.Files {
		if !slices.Contains(files, name) {
			files = append(files, name)
		}
	}
	found := map[string][]*Finding{}
	for i := range f.List {
		one := &f.List[i]
		if found[one.File] == nil && !slices.Contains(files, one.File) {
			files = append(files, one.File)
		}
		found[one.File] = append(found[one.File], one)
	}
	suite := junitSuite{Name: checkSuite}
	for _, name := range files {
		suite.add(fileCase(name, found[name]), 0)
	}
	return writeJUnit(w, suite)
}

// fileCase returns the case of a file with what was found in it.
func fileCase(name string, found []*Finding) junitCase {
	c := junitCase{Class: checkSuite, Name: printable(name)}
	if name == "" {
		c.Name = checkSuite
	}
	var failures, notes strings.Builder
	var worst *Finding
	more := -1
	for _, one := range found {
		to := &notes
		if one.Level.AtLeast(Warning) {
			to = &failures
			more++
			if worst == nil || !worst.Level.AtLeast(one.Level) {
				worst = one
			}
		}
		fmt.Fprintln(to, one)
		for _, p := range one.Related {
			fmt.Fprintf(to, "    %s\n", p)
		}
	}
	if notes.Len() > 0 {
		c.Out = &junitOut{notes.String()}
	}
	if worst != nil {
		message := printable(worst.message())
		if more > 0 {
			message += fmt.Sprintf(" (and %d more)", more)
		}
		c.Failure = &junitFailure{Message: message, Type: printable(worst.Rule), Text: failures.String()}
	}
	return c
}

// add adds a case that took so long.
func (s *junitSuite) add(c junitCase, took time.Duration) {
	c.Time = seconds(took)
	s.Tests++
	if c.Failure != nil {
		s.Failures++
	}
	s.Cases = append(s.Cases, c)
	s.took += took
}

func writeJUnit(w io.Writer, suites ...junitSuite) error {
	all := junitSuites{Suites: suites}
	var took time.Duration
	for i := range suites {
		suites[i].Time = seconds(suites[i].took)
		took += suites[i].took
		all.Tests += suites[i].Tests
		all.Failures += suites[i].Failures
	}
	all.Time = seconds(took)
	data, err := xml.MarshalIndent(all, "", "  ")
	if err != nil {
		return fmt.Errorf("write junit: %w", err)
	}
	_, err = io.WriteString(w, xml.Header+string(data)+"\n")
	return err
}

// seconds writes a time as JUnit has it. Jenkins' xUnit plug-in takes no more
// than three decimals.
func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', 3, 64) }
