package sigstore

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
)

const (
	maxToken     = 64 << 10 // bytes of a token server's answer
	maxChallenge = 4 << 10  // bytes of one WWW-Authenticate header
)

// answer returns the Authorization header that a registry asks for with its
// WWW-Authenticate headers: a token of its token server where it names one
// (distribution specification, "Token Authentication"), the password
// otherwise.
func (s *session) answer(ctx context.Context, challenges []string) (string, error) {
	var basic bool
	for _, c := range challenges {
		scheme, params, err := parseChallenge(c)
		if err != nil {
			return "", err
		}
		switch scheme {
		case "bearer":
			return s.token(ctx, params)
		case "basic":
			basic = true
		}
	}
	if !basic {
		return "", errors.New("it asks for authentication, but in no way known here")
	}
	password, err := s.password()
	if err != nil {
		return "", err
	}
	if password == "" {
		return "", errors.New("it asks for a user name and password; give them under registries")
	}
	return password, nil
}

// password returns the header for basic authentication, empty where there are
// no credentials.
func (s *session) password() (string, error) {
	if s.registry.Username == "" {
		return "", nil
	}
	b, err := readBounded(s.registry.PasswordFile, maxPassword)
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	password := strings.TrimRight(string(b), "\r\n")
	if password == "" {
		return "", fmt.Errorf("read the password: %s is empty", s.registry.PasswordFile)
	}
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(s.registry.Username+":"+password)), nil
}

// token asks the token server for leave to pull the repository.
func (s *session) token(ctx context.Context, params map[string]string) (string, error) {
	realm, err := url.Parse(params["realm"])
	if err != nil || realm.Host == "" || realm.User != nil {
		return "", errors.New("it names a token server that is no URL")
	}
	if realm.Scheme != "https" && (realm.Scheme != "http" || !s.registry.PlainHTTP) {
		return "", fmt.Errorf("it names a token server over %q, which is not https", realm.Scheme)
	}
	password, err := s.password()
	if err != nil {
		return "", err
	}
	if password != "" && !s.mayAsk(realm) {
		return "", fmt.Errorf("it names %q as its token server; the password is sent there only where token_host of the registry says so", realm.Host)
	}
	query := realm.Query()
	if service := params["service"]; service != "" {
		query.Set("service", service)
	}
	// Not the scope that the registry names: what is asked for is what is
	// needed.
	query.Set("scope", "repository:"+s.ref.repository+":pull")
	realm.RawQuery = query.Encode()
	resp, err := s.send(ctx, realm, "application/json", password, realm.Scheme+"://"+realm.Host)
	if err != nil {
		return "", fmt.Errorf("ask its token server: %w", err)
	}
	defer resp.Body.Close()
	body, err := readAnswer(resp, maxToken)
	if err != nil {
		return "", fmt.Errorf("ask its token server: %w", err)
	}
	var got struct {
		Token  string `json:"token"`
		Access string `json:"access_token"`
	}
	if err := json.Unmarshal(body, &got); err != nil {
		return "", errors.New("ask its token server: the answer is not the JSON it should be")
	}
	if got.Token == "" {
		got.Token = got.Access
	}
	if got.Token == "" || strings.ContainsFunc(got.Token, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return "", errors.New("ask its token server: the answer holds no token")
	}
	return "Bearer " + got.Token, nil
}

// tokenHosts are those of registries that everybody uses, which are others than
// the registry's own.
var tokenHosts = map[string]string{
	"registry-1.docker.io": "auth.docker.io",
	"registry.gitlab.com":  "gitlab.com",
}

// mayAsk tells whether the registry's password may be sent to a token server:
// to the registry itself, host and port, or to the host that the settings or
// tokenHosts name. What two names share says nothing: below one domain there
// are registries of many customers.
func (s *session) mayAsk(tokenServer *url.URL) bool {
	home := s.ref.host()
	named := cmp.Or(s.registry.TokenHost, tokenHosts[home], home)
	scheme := "https"
	if s.registry.PlainHTTP {
		scheme = "http"
	}
	return hostPort(tokenServer.Host, tokenServer.Scheme) == hostPort(named, scheme)
}

// hostPort returns a host with its port, that of the scheme where it has none.
func hostPort(host, scheme string) string {
	u := url.URL{Host: strings.ToLower(host)}
	port := u.Port()
	if port == "" {
		port = "443"
		if scheme == "http" {
			port = "80"
		}
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// parseChallenge reads a WWW-Authenticate header of one challenge (RFC 9110,
// section 11.6.1). Names are in lower case in what it returns.
func parseChallenge(header string) (scheme string, params map[string]string, err error) {
	if len(header) > maxChallenge {
		return "", nil, errors.New("its WWW-Authenticate header is longer than 4 KiB")
	}
	scheme, rest, _ := strings.Cut(strings.TrimSpace(header), " ")
	params = map[string]string{}
	for rest = strings.TrimLeft(rest, " \t,"); rest != ""; rest = strings.TrimLeft(rest, " \t,") {
		name, after, ok := strings.Cut(rest, "=")
		name = strings.ToLower(strings.TrimSpace(name))
		if !ok || name == "" || strings.ContainsAny(name, " \t,\"") {
			return "", nil, errors.New("its WWW-Authenticate header is malformed")
		}
		var value string
		if value, rest, ok = parameter(strings.TrimLeft(after, " \t")); !ok {
			return "", nil, errors.New("its WWW-Authenticate header is malformed")
		}
		if _, twice := params[name]; twice {
			return "", nil, fmt.Errorf("its WWW-Authenticate header says %q twice", name)
		}
		params[name] = value
	}
	return strings.ToLower(scheme), params, nil
}

// parameter reads a token or a quoted string.
func parameter(s string) (value, rest string, ok bool) {
	if !strings.HasPrefix(s, `"`) {
		if i := strings.IndexAny(s, " \t,"); i >= 0 {
			return s[:i], s[i:], i > 0
		}
		return s, "", s != ""
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return b.String(), s[i+1:], true
		case c == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		default:
			b.WriteByte(c)
		}
	}
	return "", "", false
}
