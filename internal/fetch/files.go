package fetch

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/narthex-id/narthex/internal/fileset"
)

// Names says what the files are called and who may read them. The zero value
// has the default names, and modes 0600 and 0644.
type Names struct {
	SVID, Key, Bundle string // names in the directory
	All               bool   // each identity in a directory of its own
	Federated         bool   // the authorities of all trust domains in Bundle too
	KeyMode           fs.FileMode
	CertMode          fs.FileMode
}

// defaults are the names of each kind.
var defaults = map[Kind]Names{
	X509: {SVID: "svid.pem", Key: "svid_key.pem", Bundle: "bundle.pem"},
	JWT:  {SVID: "jwt_svid.token", Bundle: "jwt_bundle.json"},
	WIT:  {SVID: "wit_svid.token", Key: "wit_svid_key.pem", Bundle: "wit_bundle.json"},
}

// Modes that Check lets pass: a key that everybody can read is nobody's.
const (
	keyModes  fs.FileMode = 0o660
	certModes fs.FileMode = 0o666
)

// Check fails where names or modes cannot be used.
func (n *Names) Check() error {
	for _, name := range []string{n.SVID, n.Key, n.Bundle} {
		if strings.Contains(name, "/") || strings.HasPrefix(name, "..") {
			return fmt.Errorf("file name %q: want a name in the directory of --write, without slashes, that does not begin with two dots", name)
		}
	}
	if n.KeyMode&^keyModes != 0 {
		return fmt.Errorf("mode %04o of keys and tokens: want at most %04o, as whoever reads them is this workload", n.KeyMode, keyModes)
	}
	if n.CertMode&^certModes != 0 {
		return fmt.Errorf("mode %04o of certificates and bundles: want at most %04o", n.CertMode, certModes)
	}
	return nil
}

// Files makes the files of what was given: the default identity, or all. Of two
// identities that go by one name, the first counts.
func (n *Names) Files(g *Given) ([]fileset.File, error) {
	names := *n
	of := defaults[g.Kind]
	names.SVID, names.Key, names.Bundle = cmp.Or(n.SVID, of.SVID), cmp.Or(n.Key, of.Key), cmp.Or(n.Bundle, of.Bundle)
	names.KeyMode, names.CertMode = cmp.Or(n.KeyMode, 0o600), cmp.Or(n.CertMode, 0o644)
	if g.Kind == Bundles {
		return names.allBundles(g)
	}
	if len(g.Identities) == 0 {
		return nil, errors.New("no identity was given")
	}
	if !n.All {
		return names.identity(g, &g.Identities[0], "")
	}
	var files []fileset.File
	var seen []string
	for i := range g.Identities {
		dir := directory(&g.Identities[i])
		if slices.Contains(seen, dir) {
			continue
		}
		seen = append(seen, dir)
		more, err := names.identity(g, &g.Identities[i], dir)
		if err != nil {
			return nil, err
		}
		files = append(files, more...)
	}
	return files, nil
}

// Doubt says that the files are of one identity of several that nobody has
// chosen: the API's order may be another one tomorrow. Empty: there is none.
func (n *Names) Doubt(g *Given) string {
	if n.All || len(g.Identities) < 2 {
		return ""
	}
	return fmt.Sprintf("%d identities were given, and the files are of the first, %s: name one by --id or --hint, or write --all", len(g.Identities), g.Identities[0].ID)
}

// plainName is what a hint has to look like to name a directory: a hint is any
// text that somebody has registered.
var plainName = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$`)

// directory is where an identity goes among others: its hint where that is a
// plain name, else the path of its SPIFFE ID.
func directory(i *Identity) string {
	if plainName.MatchString(i.Hint) {
		return i.Hint
	}
	return strings.TrimPrefix(i.ID.Path(), "/")
}

// identity makes the files of one identity and the bundles it came with.
func (n *Names) identity(g *Given, i *Identity, dir string) ([]fileset.File, error) {
	var files []fileset.File
	add := func(name string, data []byte, mode fs.FileMode) {
		files = append(files, fileset.File{Name: path.Join(dir, name), Data: data, Mode: mode})
	}
	if g.Kind == X509 {
		add(n.SVID, i.Chain, n.CertMode)
	} else {
		add(n.SVID, []byte(i.Token), n.KeyMode)
	}
	if i.key != nil {
		add(n.Key, i.key, n.KeyMode)
	}
	var own []byte
	var others []byte
	for b := range g.Bundles {
		bundle := &g.Bundles[b]
		data := bundle.of(g.Kind)
		switch {
		case len(data) == 0:
		case bundle.TrustDomain == i.ID.TrustDomain():
			own = data
		default:
			add(foreignName(n.Bundle, bundle.TrustDomain), data, n.CertMode)
			others = append(others, data...)
		}
	}
	if n.Federated {
		own = append(slices.Clone(own), others...)
	}
	if len(own) == 0 && g.Kind == X509 {
		return nil, fmt.Errorf("no bundle was given of %s, the trust domain of %s", i.ID.TrustDomain(), i.ID)
	}
	if len(own) > 0 {
		add(n.Bundle, own, n.CertMode)
	}
	return files, nil
}

// allBundles makes a file of each bundle of each trust domain.
func (n *Names) allBundles(g *Given) ([]fileset.File, error) {
	var files []fileset.File
	for i := range g.Bundles {
		b := &g.Bundles[i]
		for _, kind := range []Kind{X509, JWT, WIT} {
			if data := b.of(kind); len(data) > 0 {
				files = append(files, fileset.File{Name: foreignName(defaults[kind].Bundle, b.TrustDomain), Data: data, Mode: n.CertMode})
			}
		}
	}
	if len(files) == 0 {
		return nil, errors.New("no bundle was given")
	}
	return files, nil
}

// of returns the bundle that SVIDs of a kind are verified by.
func (b *Bundle) of(kind Kind) []byte {
	switch kind {
	case JWT:
		return b.JWT
	case WIT:
		return b.WIT
	}
	return b.X509
}

// foreignName is the name of another trust domain's bundle: bundle.pem becomes
// bundle.partner.example.pem.
func foreignName(bundle string, td spiffeid.TrustDomain) string {
	end := path.Ext(bundle)
	return strings.TrimSuffix(bundle, end) + "." + td.Name() + end
}
