package agent

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/narthex-id/narthex/internal/testca"
)

var stockTD = spiffeid.RequireTrustDomainFromString("example.test")

// writeStock writes what a spire-agent with this SVID leaves: the key in force
// and the one before it.
func writeStock(t testing.TB, dir string, svid tls.Certificate, roots ...*x509.Certificate) {
	t.Helper()
	chain := make([][]byte, len(svid.Certificate))
	for i, der := range svid.Certificate {
		chain[i] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	bundle := make([][]byte, len(roots))
	for i, c := range roots {
		bundle[i] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	pkcs8 := func(k any) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	for name, content := range map[string]any{
		stockStateFile: map[string]any{"svid": chain, "bundle": bundle, "reattestable": true, "bootstrap_use": 1},
		stockKeysFile:  map[string]any{"keys": map[string][]byte{"agent-svid-A": pkcs8(testca.NewKey(t)), "agent-svid-B": pkcs8(svid.PrivateKey)}},
	} {
		data, err := json.Marshal(content)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// privateDir is a directory that nobody else can write to.
func privateDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil { // as spire-agent makes its own
		t.Fatal(err)
	}
	return dir
}

func TestTakeOverReads(t *testing.T) {
	ca, other := testca.New(t, "example.test"), testca.New(t, "example.test")
	agentSVID := ca.SVID("/spire/agent/x509pop/1")
	const secret = "c2VjcmV0" // in a broken keys.json
	for name, test := range map[string]struct {
		change func(t *testing.T, dir string) // of what a good spire-agent left
		want   string                         // in the error; "": it is taken over
		none   bool                           // nothing is left
	}{
		"good":         {change: func(*testing.T, string) {}},
		"expired":      {func(t *testing.T, dir string) { writeStock(t, dir, ca.SVID("/spire/agent/1", past), ca.Cert) }, "has expired", true},
		"no file":      {func(t *testing.T, dir string) { remove(t, dir, stockStateFile) }, stockStateFile, true},
		"no key file":  {func(t *testing.T, dir string) { remove(t, dir, stockKeysFile) }, stockKeysFile, true},
		"forgotten":    {func(t *testing.T, dir string) { put(t, dir, stockStateFile, `{"svid":null,"bundle":null}`) }, "holds no SVID", true},
		"a workload's": {func(t *testing.T, dir string) { writeStock(t, dir, ca.SVID("/web"), ca.Cert) }, "not the SPIFFE ID of an agent", false},
		"other domain": {func(t *testing.T, dir string) {
			o := testca.New(t, "other.test")
			writeStock(t, dir, o.SVID("/spire/agent/1"), o.Cert)
		}, "not of trust domain", false},
		"other bundle": {func(t *testing.T, dir string) { writeStock(t, dir, agentSVID, other.Cert) }, "does not vouch", false},
		"no bundle":    {func(t *testing.T, dir string) { writeStock(t, dir, agentSVID) }, "does not vouch", false},
		"other key":    {func(t *testing.T, dir string) { put(t, dir, stockKeysFile, `{"keys":{}}`) }, "has not the key", false},
		"broken key":   {func(t *testing.T, dir string) { put(t, dir, stockKeysFile, `{"keys":{"agent-svid-A":"`+secret+`"}}`) }, "has not the key", false},
		"no JSON":      {func(t *testing.T, dir string) { put(t, dir, stockKeysFile, `{"keys":{"a":"`+secret) }, "no JSON at byte", false},
		"another kind": {func(t *testing.T, dir string) { put(t, dir, stockKeysFile, `{"keys":"`+secret+`"}`) }, "another kind of value", false},
		"no PEM":       {func(t *testing.T, dir string) { put(t, dir, stockStateFile, `{"svid":["`+secret+`"]}`) }, "no PEM block", false},
		"too long":     {func(t *testing.T, dir string) { try(t, os.Truncate(filepath.Join(dir, stockStateFile), stateLimit+1)) }, "more than", false},
		"readable key": {func(t *testing.T, dir string) { try(t, os.Chmod(filepath.Join(dir, stockKeysFile), 0o640)) }, "can be read by others", false},
		"writable":     {func(t *testing.T, dir string) { try(t, os.Chmod(filepath.Join(dir, stockStateFile), 0o620)) }, "can be written by others", false},
		"open dir":     {func(t *testing.T, dir string) { try(t, os.Chmod(dir, 0o777)) }, "others can write to", false},
		"a link":       {func(t *testing.T, dir string) { link(t, dir, stockStateFile) }, "symbolic link", false},
		"a pipe": {func(t *testing.T, dir string) {
			remove(t, dir, stockKeysFile)
			try(t, unix.Mkfifo(filepath.Join(dir, stockKeysFile), 0o600))
		}, "no regular file", false},
		"another's dir": {func(t *testing.T, dir string) { root(t); try(t, os.Chown(dir, 4001, 4001)) }, "belongs to user 4001", false},
		"another's key": {func(t *testing.T, dir string) {
			root(t)
			try(t, os.Chown(filepath.Join(dir, stockKeysFile), 4001, 4001))
		}, "belongs to user 4001", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := privateDir(t)
			writeStock(t, dir, agentSVID, ca.Cert)
			test.change(t, dir)
			left, key, err := (&TakeOver{DataDir: dir}).read(stockTD, time.Now())
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) || errors.Is(err, errNothingLeft) != test.none {
				t.Fatalf("%v, want %q, nothing left: %v", err, test.want, test.none)
			}
			if err != nil {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("the error shows what is in the file: %v", err)
				}
				return
			}
			if public, ok := key.Public().(*ecdsa.PublicKey); !ok || !public.Equal(agentSVID.PrivateKey.(*ecdsa.PrivateKey).Public()) {
				t.Error("the key is not the SVID's")
			}
			if !left.Reattestable || left.TrustDomain != stockTD.Name() || len(left.SVID) != 1 || len(left.Bundle) != 1 {
				t.Errorf("took over %+v", left)
			}
		})
	}
}

func past(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
}

func try(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, dir, name, content string) {
	t.Helper()
	try(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
}

func remove(t *testing.T, dir, name string) { t.Helper(); try(t, os.Remove(filepath.Join(dir, name))) }

func link(t *testing.T, dir, name string) {
	t.Helper()
	path := filepath.Join(dir, name)
	try(t, errors.Join(os.Rename(path, path+".real"), os.Symlink(path+".real", path)))
}

func root(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a file away")
	}
}

// What a keys directory of its own holds is found there.
func TestTakeOverOfAnotherKeysDirectory(t *testing.T) {
	ca := testca.New(t, "example.test")
	dir, keys := privateDir(t), privateDir(t)
	writeStock(t, dir, ca.SVID("/spire/agent/x509pop/1"), ca.Cert)
	try(t, os.Rename(filepath.Join(dir, stockKeysFile), filepath.Join(keys, stockKeysFile)))
	if _, _, err := (&TakeOver{DataDir: dir, Keys: keys}).read(stockTD, time.Now()); err != nil {
		t.Error(err)
	}
}

// A process in a proc of our own making, as the kernel would show it.
type stockProcess struct {
	args []string
	conf string // conf/agent/agent.conf below its working directory
}

func TestStockAgentIsSeen(t *testing.T) {
	run := []string{"/opt/spire/bin/spire-agent", "run"}
	for name, test := range map[string]struct {
		stockProcess
		dataDir string // below its working directory
		want    bool
	}{
		"nobody":             {stockProcess{[]string{"bash"}, ""}, "data", false},
		"by HCL":             {stockProcess{run, "agent {\n  data_dir = \"./data\"\n}"}, "data", true},
		"by JSON":            {stockProcess{run, `{"agent":{"data_dir":"data"}}`}, "data", true},
		"another one":        {stockProcess{run, `agent { data_dir = "./other" }`}, "data", false},
		"by a flag":          {stockProcess{append(run, "-dataDir", "data"), `agent { data_dir = "./other" }`}, "data", true},
		"by another flag":    {stockProcess{append(run, "--dataDir=other"), `agent { data_dir = "./data" }`}, "data", false},
		"by default":         {stockProcess{run, "agent {}"}, ".", true},
		"above":              {stockProcess{run, `agent { data_dir = "../data" }`}, "../data", true},
		"by a variable":      {stockProcess{run, `agent { data_dir = "$DIR" }`}, "data", true},
		"no configuration":   {stockProcess{append(run, "-config", "nowhere"), ""}, "data", true},
		"asks for something": {stockProcess{[]string{"spire-agent", "api", "fetch"}, ""}, "data", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			proc, cwd := t.TempDir(), filepath.Join(t.TempDir(), "wd")
			dataDir := filepath.Join(cwd, test.dataDir)
			at := filepath.Join(proc, "4711")
			try(t, errors.Join(os.MkdirAll(filepath.Join(cwd, "conf", "agent"), 0o700), os.MkdirAll(dataDir, 0o700), os.Mkdir(at, 0o700),
				os.Symlink("/", filepath.Join(at, "root")), os.Symlink(cwd, filepath.Join(at, "cwd"))))
			put(t, at, "cmdline", strings.Join(test.args, "\x00")+"\x00")
			put(t, filepath.Join(cwd, "conf", "agent"), "agent.conf", test.conf)
			err := (&TakeOver{DataDir: dataDir}).alone(proc)
			if (err != nil) != test.want || err != nil && (!strings.Contains(err.Error(), "pid 4711") || !strings.Contains(err.Error(), dataDir)) {
				t.Errorf("%v, want it to be seen: %v", err, test.want)
			}
		})
	}
	t.Run("this machine's", func(t *testing.T) {
		if err := (&TakeOver{DataDir: t.TempDir()}).alone("/proc"); err != nil {
			t.Error(err)
		}
	})
}

// A stranger may call a process as they like.
func TestStockAgentOfAStranger(t *testing.T) {
	root(t)
	proc, dataDir := t.TempDir(), t.TempDir()
	at := filepath.Join(proc, strconv.Itoa(4711))
	try(t, errors.Join(os.Mkdir(at, 0o700), os.Symlink("/", filepath.Join(at, "root"))))
	put(t, at, "cmdline", "spire-agent\x00run\x00-dataDir\x00"+dataDir+"\x00")
	try(t, os.Chown(at, 4001, 4001))
	if err := (&TakeOver{DataDir: dataDir}).alone(proc); err != nil {
		t.Error(err)
	}
}

// Root of a container may have its configuration be a pipe that nobody writes to.
func TestStockAgentWithAPipe(t *testing.T) {
	proc, cwd, dataDir := t.TempDir(), t.TempDir(), t.TempDir()
	at := filepath.Join(proc, "4711")
	try(t, errors.Join(os.Mkdir(at, 0o700), os.Symlink(cwd, filepath.Join(at, "root")), os.Symlink(cwd, filepath.Join(at, "cwd")),
		unix.Mkfifo(filepath.Join(cwd, "agent.conf"), 0o600)))
	put(t, at, "cmdline", "spire-agent\x00run\x00-config\x00agent.conf\x00")
	if err := (&TakeOver{DataDir: dataDir}).alone(proc); err != nil {
		t.Error(err)
	}
}

func FuzzTakeOver(f *testing.F) {
	ca := testca.New(f, "example.test")
	dir := privateDir(f)
	writeStock(f, dir, ca.SVID("/spire/agent/x509pop/1"), ca.Cert)
	data, err := os.ReadFile(filepath.Join(dir, stockStateFile))
	try(f, err)
	keys, err := os.ReadFile(filepath.Join(dir, stockKeysFile))
	try(f, err)
	f.Add(data, keys)
	f.Add([]byte(`{"svid":["LS0t"],"bundle":[]}`), []byte(`{"keys":{"agent-svid-A":"MAA="}}`))
	f.Fuzz(func(t *testing.T, data, keys []byte) {
		put(t, dir, stockStateFile, string(data))
		put(t, dir, stockKeysFile, string(keys))
		left, key, err := (&TakeOver{DataDir: dir}).read(stockTD, time.Now())
		if (err == nil) != (key != nil) || (err == nil) != (len(left.SVID) > 0) {
			t.Errorf("got %v, %v, %v", left, key, err)
		}
	})
}
