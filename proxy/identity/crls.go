package identity

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/telemetry"
	"github.com/narthex-id/narthex/internal/watch"
)

// CRLsConfig says which files hold CRLs.
type CRLsConfig struct {
	// Files are file names, or patterns of them as in filepath.Match, by the
	// trust domain whose certificates they speak of.
	Files map[spiffeid.TrustDomain][]string

	// Identities is the source whose bundles the CRLs belong to: one of
	// NewWorkloadAPI or NewFiles.
	Identities Source

	Poll    time.Duration // as FilesConfig.Poll
	Metrics *telemetry.Metrics
	Log     hclog.Logger
}

// CRLs keeps the certificate revocation lists of files in force. The files of
// one trust domain are read again when they change, all or nothing: where one
// is not good (cut short, forged, of another domain) those in force stay. A
// CRL in force gives way only to a newer one of the same issuer: an older one
// is a rollback, and one whose file is gone still counts, until the process
// ends.
//
// A domain whose files were never good is closed: nobody of it comes in. CRLs
// past their nextUpdate refuse new connections that they would have to speak
// of, and leave live ones alone.
type CRLs struct {
	into    *store
	poll    time.Duration
	log     hclog.Logger
	cancel  context.CancelFunc
	loop    sync.WaitGroup
	figures crlFigures

	mu      sync.Mutex // guards the following; held while files are read
	files   map[spiffeid.TrustDomain][]string
	domains map[spiffeid.TrustDomain]*crlFiles
}

// crlFiles are the files of one trust domain and what came of them.
type crlFiles struct {
	paths   []string
	sum     [sha256.Size]byte // of the contents in force; zero while there are others
	good    bool              // they were, once
	lists   []*crl
	problem string
	notes   []string      // of files that are good and still worth a word
	said    map[*crl]bool // whether a CRL was warned of: false when it grew old, true once it is out of date
}

type crlFigures struct {
	next    *telemetry.Family[telemetry.Gauge]
	entries *telemetry.Family[telemetry.Gauge]
	reloads *telemetry.Family[telemetry.Counter]
}

// crlOld is the share of its life, in percent, after which a CRL that was not
// renewed is warned of.
const crlOld = 80

// NewCRLs reads the files and watches them until Close. They are in force when
// it returns. Files that are not good are no error: the reason stands in the
// log and the report, and the domain is closed until they are.
func NewCRLs(c CRLsConfig) (*CRLs, error) {
	source, ok := c.Identities.(interface{ holder() *store })
	if !ok {
		return nil, fmt.Errorf("CRLs: a source of type %T holds no bundles they could belong to", c.Identities)
	}
	if c.Log == nil {
		c.Log = hclog.NewNullLogger()
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &CRLs{
		into: source.holder(), poll: c.Poll, log: c.Log, cancel: cancel, figures: newCRLFigures(c.Metrics),
		domains: map[spiffeid.TrustDomain]*crlFiles{},
	}
	l.Configure(c.Files)
	l.loop.Go(func() {
		watch.Files(ctx, watch.Config{Paths: l.paths, Changed: l.load, Poll: c.Poll, Log: c.Log})
	})
	return l, nil
}

func newCRLFigures(m *telemetry.Metrics) crlFigures {
	return crlFigures{
		next:    m.Gauge("narthex_crl_next_update_timestamp_seconds", "When the first CRL of a trust domain is out of date.", "trust_domain"),
		entries: m.Gauge("narthex_crl_entries", "Certificates that the CRLs of a trust domain list as revoked.", "trust_domain"),
		reloads: m.Counter("narthex_crl_reloads_total", "Changed CRL files of a trust domain, by whether they are in force.", "trust_domain", "result"),
	}
}

// CheckCRLs reads the files of one trust domain once, as NewCRLs does, and
// returns why they would not be used. It asks neither who signed them nor how
// old they are.
func CheckCRLs(patterns []string) error {
	paths, err := expandCRLs(patterns)
	if err != nil {
		return err
	}
	if _, err := sumFiles(paths); err != nil { // which bounds them
		return err
	}
	_, err = readCRLs(paths)
	return err
}

// Close stops watching and waits for that to end. What is in force stays.
func (l *CRLs) Close() error {
	l.cancel()
	l.loop.Wait()
	return nil
}

// Configure names other files. They are in force when it returns, as far as
// they are good; domains that are not named any more have no CRLs.
func (l *CRLs) Configure(files map[spiffeid.TrustDomain][]string) {
	l.mu.Lock()
	l.files = maps.Clone(files)
	l.mu.Unlock()
	l.load()
}

// paths are what is watched: the patterns, whose directory is what matters,
// and the files they name now, which may be links into other directories.
func (l *CRLs) paths() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var paths []string
	for td, patterns := range l.files {
		paths = append(paths, patterns...)
		if d := l.domains[td]; d != nil {
			paths = append(paths, d.paths...)
		}
	}
	return paths
}

// load reads what has changed and puts it in force.
func (l *CRLs) load() {
	l.mu.Lock()
	defer l.mu.Unlock()
	trust, now, changed := l.into.trusted(), time.Now(), false
	for _, td := range slices.SortedFunc(maps.Keys(l.files), spiffeid.TrustDomain.Compare) {
		d := l.domains[td]
		if d == nil {
			d = &crlFiles{said: map[*crl]bool{}}
			l.domains[td], changed = d, true
		}
		if d.load(td, l.files[td], trust, now) {
			changed = true
			l.tell(td, d)
		}
		l.warnOld(td, d, now)
	}
	for td := range l.domains {
		if _, still := l.files[td]; !still {
			delete(l.domains, td)
			l.figures.next.Delete(td.Name())
			l.figures.entries.Delete(td.Name())
			changed = true
		}
	}
	if changed {
		l.into.revoke(l.snapshot())
	}
}

// snapshot is what is in force, for those who look certificates up.
func (l *CRLs) snapshot() *revocations {
	r := &revocations{domains: make(map[spiffeid.TrustDomain]*crlSet, len(l.domains))}
	for td, d := range l.domains {
		set := &crlSet{lists: make(map[string][]*crl, len(d.lists)), problem: cmp.Or(d.problem, strings.Join(d.notes, "; "))}
		if !d.good {
			set.unusable = fmt.Errorf("the CRLs of %s could not be read yet, so nobody can tell who is revoked: %s", td, d.problem)
		}
		for _, c := range d.lists {
			set.lists[string(c.issuer)] = append(set.lists[string(c.issuer)], c)
		}
		r.domains[td] = set
	}
	return r
}

// tell says once what became of changed files.
func (l *CRLs) tell(td spiffeid.TrustDomain, d *crlFiles) {
	result, entries := "ok", 0
	var next time.Time
	for _, c := range d.lists {
		entries += len(c.revoked)
		if next.IsZero() || c.until.Before(next) {
			next = c.until
		}
	}
	switch {
	case d.problem != "" && d.good:
		result = "error"
		l.log.Warn("CRL files are not good: what was read before stays in force", "trust_domain", td, "reason", d.problem)
	case d.problem != "":
		result = "error"
		l.log.Error("CRL files are not good: connections of this trust domain are refused until they are", "trust_domain", td, "reason", d.problem)
	default:
		l.log.Info("CRLs in force", "trust_domain", td, "crls", len(d.lists), "revoked", entries, "next_update", next.UTC())
		for _, note := range d.notes {
			l.log.Warn("CRLs: "+note, "trust_domain", td)
		}
	}
	l.figures.reloads.With(td.Name(), result).Inc()
	if d.good {
		l.figures.next.With(td.Name()).SetTime(next)
		l.figures.entries.With(td.Name()).Set(float64(entries))
	}
}

// warnOld warns once of a CRL that should have been renewed by now, and once
// of one that is out of date.
func (l *CRLs) warnOld(td spiffeid.TrustDomain, d *crlFiles, now time.Time) {
	for _, c := range d.lists {
		over, warned := d.said[c]
		old := c.from.Add(c.until.Sub(c.from) / 100 * crlOld)
		switch {
		case now.After(c.until) && !over:
			d.said[c] = true
			l.log.Warn("a CRL is out of date: new connections it would have to speak of are refused until it is renewed",
				"trust_domain", td, "crl", c, "file", c.file, "next_update", c.until.UTC())
		case now.After(old) && !warned && !now.After(c.until):
			d.said[c] = false
			l.log.Warn("a CRL is about to be out of date and was not renewed",
				"trust_domain", td, "crl", c, "file", c.file, "next_update", c.until.UTC(), "left", c.until.Sub(now).Round(time.Second))
		}
	}
	maps.DeleteFunc(d.said, func(c *crl, _ bool) bool { return !slices.Contains(d.lists, c) })
}

// load reads the files that the patterns name now, and reports whether
// anything is other than before.
func (d *crlFiles) load(td spiffeid.TrustDomain, patterns []string, trust *Trust, now time.Time) bool {
	paths, err := expandCRLs(patterns)
	var sum [sha256.Size]byte
	if err == nil {
		d.paths = paths
		sum, err = sumFiles(paths)
	}
	if err == nil && sum == d.sum {
		return false
	}
	var lists []*crl
	var notes []string
	if err == nil {
		lists, err = readCRLs(paths)
	}
	if err == nil {
		lists, notes, err = d.succeed(td, lists, trust, now)
	}
	if err != nil {
		d.sum = [sha256.Size]byte{} // looked at again, also when nothing changes: a clock or a bundle may
		news := d.problem != err.Error()
		d.problem = err.Error()
		return news
	}
	d.sum, d.good, d.lists, d.notes, d.problem = sum, true, lists, notes, ""
	return true
}

// expandCRLs returns the files that patterns name. A pattern that names none
// is an error: a CRL that is not there must not look like one that revokes
// nobody.
func expandCRLs(patterns []string) ([]string, error) {
	var paths []string
	for _, pattern := range patterns {
		found, err := filepath.Glob(pattern)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%s: %w", pattern, err)
		case len(found) == 0:
			return nil, fmt.Errorf("%s: %w", pattern, fs.ErrNotExist)
		}
		paths = append(paths, found...)
	}
	slices.Sort(paths)
	paths = slices.Compact(paths)
	if len(paths) > maxCRLs {
		return nil, fmt.Errorf("%d CRL files, at most %d are read", len(paths), maxCRLs)
	}
	return paths, nil
}

// sumFiles is other when a file is. It holds none of them in memory.
func sumFiles(paths []string) (sum [sha256.Size]byte, err error) {
	all, left := sha256.New(), int64(maxCRLBytes)
	for _, path := range paths {
		one := sha256.New()
		n, err := sumFile(one, path, left)
		if err != nil {
			return sum, fmt.Errorf("%s: %w", path, err)
		}
		left -= n
		_, _ = fmt.Fprintf(all, "%s\x00%x\x00", path, one.Sum(nil)) // never fails
	}
	all.Sum(sum[:0])
	return sum, nil
}

func sumFile(w io.Writer, path string, limit int64) (int64, error) {
	file, err := openPlain(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = file.Close() }()
	n, err := io.Copy(w, io.LimitReader(file, limit+1))
	if err == nil && n > limit {
		err = fmt.Errorf("larger than the %d bytes that all CRL files of a trust domain may have", maxCRLBytes)
	}
	return n, err
}

// readCRLs reads all files, or none.
func readCRLs(paths []string) ([]*crl, error) {
	var lists []*crl
	for _, path := range paths {
		data, err := readPlain(path, maxCRLBytes)
		if err == nil {
			var some []*crl
			some, err = parseCRLs(path, data)
			lists = append(lists, some...)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return lists, nil
}

// succeed returns what is in force after these CRLs were read: of each issuer
// and scope the newest one, be it read before or now. An error is one that
// keeps all of them from being used.
func (d *crlFiles) succeed(td spiffeid.TrustDomain, read []*crl, trust *Trust, now time.Time) (lists []*crl, notes []string, err error) {
	for _, was := range d.lists {
		_ = was.recognise(td, trust) // its authority may have come meanwhile; whether it is its own is asked at each lookup
	}
	lists = slices.Clone(d.lists)
	there := map[*crl]bool{}
	for _, c := range read {
		if now.Before(c.from) {
			return nil, nil, fmt.Errorf("%s: %s begins at %s only; are the clocks right?", c.file, c, c.from.UTC().Format(time.RFC3339))
		}
		at := slices.IndexFunc(lists, c.sameScope)
		if at < 0 {
			if err := c.recognise(td, trust); err != nil {
				return nil, nil, fmt.Errorf("%s: %s: %w", c.file, c, err)
			}
			lists, there[c] = append(lists, c), true
			continue
		}
		was := lists[at]
		switch next, err := was.followedBy(c, td, trust); {
		case err != nil:
			return nil, nil, fmt.Errorf("%s: %s: %w", c.file, c, err)
		case next == was && c.sum != was.sum && !there[was]:
			notes = append(notes, fmt.Sprintf("%s: %s is older than %s, which is in force and stays: a rollback is not followed", c.file, c, was))
			there[was] = true
		default:
			lists[at], there[next] = next, true
		}
	}
	for _, c := range lists {
		if !there[c] {
			notes = append(notes, fmt.Sprintf("%s stays in force though no file holds it any more (%s)", c, c.file))
		}
	}
	if len(lists) > maxCRLs {
		return nil, nil, fmt.Errorf("%d CRLs, at most %d are held", len(lists), maxCRLs)
	}
	return lists, notes, nil
}

// followedBy returns which of two CRLs of one scope is to be in force. A CRL
// whose signature was verified gives way to none that is not signed as well.
func (c *crl) followedBy(next *crl, td spiffeid.TrustDomain, trust *Trust) (*crl, error) {
	if next.sum == c.sum {
		return c, nil
	}
	err := next.recognise(td, trust)
	signer := c.known()
	if signer != nil && next.known() == nil && (err != nil || next.signedBy(signer) != nil) {
		return nil, cmp.Or(err, errors.New("it is not signed by the authority that signed the CRL in force: it is forged, or lacks the authority key identifier that tells two keys apart"))
	}
	switch {
	case err != nil:
		return nil, err
	case signer == nil && next.known() != nil:
		return next, nil
	case next.olderThan(c):
		return c, nil
	}
	return next, nil
}

// recognise verifies the signature of c where its authority is in a bundle.
// Where it is an intermediate's it stays open until a chain presents that. An
// error is for one that cannot be good: forged, or of another trust domain.
func (c *crl) recognise(td spiffeid.TrustDomain, trust *Trust) error {
	if c.known() != nil {
		return nil
	}
	var first error
	for by := range authoritiesOf(trust, td) {
		if !c.claims(by) {
			continue
		}
		err := c.signedBy(by)
		if err == nil {
			return nil
		}
		first = cmp.Or(first, fmt.Errorf("its signature is not good, though the bundle of %s has its authority: %w", td, err))
	}
	if first != nil {
		return first
	}
	for other := range trust.domains {
		for by := range authoritiesOf(trust, other) {
			if other != td && c.claims(by) && c.wouldBe(by) {
				return fmt.Errorf("it is of trust domain %s; a CRL counts for its own domain alone, so name it there", other)
			}
		}
	}
	return nil
}

func authoritiesOf(trust *Trust, td spiffeid.TrustDomain) func(func(*x509.Certificate) bool) {
	return func(yield func(*x509.Certificate) bool) {
		if d := trust.domains[td]; d != nil {
			for _, c := range d.authorities {
				if !yield(c) {
					return
				}
			}
		}
	}
}
