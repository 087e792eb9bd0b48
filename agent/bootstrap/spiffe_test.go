package bootstrap

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"github.com/narthex-id/narthex/internal/testca"
)

// TestSPIFFEBundle has keys beside an authority: those that are to be passed over
// (SPIFFE Trust Domain and Bundle §4.2, X509-SVID §6.2) and those that fail the
// whole.
func TestSPIFFEBundle(t *testing.T) {
	t.Parallel()
	root := testca.New(t, td.Name()).Cert
	x5c := func(certs ...*x509.Certificate) string {
		var list []string
		for _, c := range certs {
			list = append(list, fmt.Sprintf("%q", base64.StdEncoding.EncodeToString(c.Raw)))
		}
		return `,"x5c":[` + strings.Join(list, ",") + `]`
	}
	key := root.PublicKey.(*ecdsa.PublicKey)
	point, err := key.Bytes() // SEC 1: 4, x, y
	if err != nil {
		t.Fatal(err)
	}
	coordinate := base64.RawURLEncoding.EncodeToString
	jwk := func(more string) string {
		return fmt.Sprintf(`{"kty":"EC","crv":"P-256","use":"x509-svid","x":%q,"y":%q%s}`, coordinate(point[1:33]), coordinate(point[33:]), more)
	}
	good, other := jwk(x5c(root)), testca.New(t, td.Name()).Cert
	for name, test := range map[string]struct {
		keys  string
		count int
		say   string // "" where it is good
	}{
		"alone":                         {good, 1, ""},
		"twice":                         {good + "," + good, 2, ""},
		"a member nobody knows":         {jwk(x5c(root) + `,"new":[]`), 1, ""},
		"an unknown kind":               {good + `,{"kty":"LMS","use":"x509-svid","x5c":["AAAA"]}`, 1, ""},
		"no kind":                       {good + `,{"use":"x509-svid","x5c":["AAAA"]}`, 1, ""},
		"an unknown use":                {good + `,{"kty":"EC","crv":"P-999","use":"ssh-svid","x5c":7}`, 1, ""},
		"a use in capitals":             {good + `,{"kty":"EC","use":"X509-SVID"}`, 1, ""},
		"no use":                        {good + `,{"kty":"EC"}`, 1, ""},
		"a use that is no text":         {good + `,{"kty":"EC","use":["x509-svid"]}`, 1, ""},
		"a JWT authority without an ID": {good + `,{"kty":"EC","use":"jwt-svid"}`, 1, ""},
		"no x5c":                        {good + "," + jwk(""), 1, ""},
		"an empty x5c":                  {good + "," + jwk(x5c()), 1, ""},
		"several certificates":          {jwk(x5c(root, other)), 1, ""},
		"garbage after the first":       {jwk(strings.Replace(x5c(root), "]", `,"AAAA"]`, 1)), 1, ""},
		"another's certificate":         {jwk(x5c(other)), 0, "do not match"},
		"no certificate":                {good + "," + jwk(`,"x5c":["AAAA"]`), 0, "key 2: "},
		"x5c is no list":                {good + "," + jwk(`,"x5c":"AAAA"`), 0, "key 2: x5c"},
		"a key that is no object":       {`"x509-svid"`, 0, "no SPIFFE bundle"},
		"all are revoked":               {"", 0, "no X.509 authority"},
	} {
		got, err := Parse([]byte(`{"new":1,"spiffe_sequence":18446744073709551615,"keys":[`+test.keys+`]}`), SPIFFE)
		switch {
		case len(got) != test.count || (err == nil) != (test.say == "") || err != nil && !strings.Contains(err.Error(), test.say):
			t.Errorf("%s: %d authorities, %v; want %d, %q", name, len(got), err, test.count, test.say)
		case err == nil && !got[0].Equal(root):
			t.Errorf("%s: another certificate", name)
		}
	}
	if _, err := Parse([]byte(`{"spiffe_sequence":1}`), SPIFFE); err == nil || !strings.Contains(err.Error(), `no "keys"`) {
		t.Errorf("without keys: %v", err)
	}
}
