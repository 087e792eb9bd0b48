package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"strings"

	"github.com/casbin/casbin/v2"
	"github.com/casbin/casbin/v2/model"
	stringadapter "github.com/casbin/casbin/v2/persist/string-adapter"
	"github.com/casbin/casbin/v2/util"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
)

// casbinEnforcer has a line for each rule, groups as roles, and a matcher that
// asks first what most lines fail: where the request goes to. Patterns are
// compared by Casbin's own functions, called by ours where a text has any: as
// they are they compile or scan each pattern of each line. Casbin asks line
// after line; there is no index.
type casbinEnforcer struct {
	enforcer *casbin.Enforcer
	requests [][]any
}

//go:embed casbin.conf
var casbinModel string

func (c *casbinEnforcer) write(m *rulemix.Mix) ([]byte, error) {
	var b bytes.Buffer
	line := func(effect, from, to string, more ...string) {
		fields := append([]string{"p", effect, from, to}, more...)
		for len(fields) < 10 {
			fields = append(fields, "")
		}
		fmt.Fprintln(&b, strings.Join(fields, ", "))
	}
	for _, id := range m.Revoked {
		line("deny", id, "")
		line("deny", "", id)
	}
	domain := "spiffe://" + m.Ceiling.Domain
	outside := domain + "/**" + casbinBut + domain + m.Ceiling.Path
	line("deny", outside, "")
	line("deny", "", outside)
	for i := range m.Rules {
		r := &m.Rules[i]
		effect := "deny"
		if r.Allow {
			effect = "allow"
		}
		line(effect, r.From, r.To, r.On, r.At, strings.Join(r.Methods, "|"), pathsCasbin(r.Paths), strings.Join(r.Hosts, "|"), headerCasbin(r))
	}
	for i := range m.Groups {
		for _, id := range m.Groups[i].IDs {
			fmt.Fprintf(&b, "g, %s, group:%s\n", id, m.Groups[i].Name)
		}
	}
	return b.Bytes(), nil
}

// casbinBut parts a pattern from what it does not cover.
const casbinBut = " but "

// pathsCasbin writes paths as keyMatch3 has them.
func pathsCasbin(paths []string) string {
	return strings.ReplaceAll(strings.Join(paths, "|"), "/**", "/*")
}

func headerCasbin(r *rulemix.Rule) string {
	if r.Header == "" {
		return ""
	}
	return r.Header + "=" + strings.Join(r.Values, "|")
}

func (c *casbinEnforcer) load(text []byte) error {
	m, err := model.NewModelFromString(casbinModel)
	if err != nil {
		return err
	}
	if c.enforcer, err = casbin.NewEnforcer(m); err != nil {
		return err
	}
	for name, f := range map[string]func(pattern, value string) bool{
		"covers": coversCasbin,
		"lists":  func(list, value string) bool { return anyCasbin(list, func(one string) bool { return one == value }) },
		"paths": func(list, value string) bool {
			return anyCasbin(list, func(one string) bool { return util.KeyMatch3(value, one) })
		},
		"hosts": func(list, value string) bool {
			return anyCasbin(list, func(one string) bool { return globCasbin(one, value) })
		},
	} {
		c.enforcer.AddFunction(name, func(args ...any) (any, error) { return f(args[0].(string), args[1].(string)), nil })
	}
	c.enforcer.AddFunction("grouped", func(args ...any) (any, error) { return strings.HasPrefix(args[0].(string), "group:"), nil })
	c.enforcer.AddFunction("header", func(args ...any) (any, error) {
		name, values, asks := strings.Cut(args[0].(string), "=")
		value, there := args[1].(map[string]string)[name]
		return !asks || there && anyCasbin(values, func(one string) bool { return one == value }), nil
	})
	c.enforcer.SetAdapter(stringadapter.NewAdapter(string(text)))
	return c.enforcer.LoadPolicy()
}

// coversCasbin compares an identity with a pattern; an empty one covers all.
func coversCasbin(pattern, id string) bool {
	if !strings.Contains(pattern, "*") {
		return pattern == "" || pattern == id
	}
	pattern, but, _ := strings.Cut(pattern, casbinBut)
	return globCasbin(pattern, id) && (but == "" || !globCasbin(but, id))
}

// globCasbin is Casbin's globMatch.
func globCasbin(pattern, value string) bool {
	ok, err := util.GlobMatch(value, pattern)
	return err == nil && ok
}

// anyCasbin asks the items of a list; an empty one covers all.
func anyCasbin(list string, is func(one string) bool) bool {
	if list == "" {
		return true
	}
	for one := range strings.SplitSeq(list, "|") {
		if is(one) {
			return true
		}
	}
	return false
}

func (c *casbinEnforcer) prepare(requests []rulemix.Request) error {
	for i := range requests {
		q := &requests[i]
		headers := map[string]string{}
		for _, h := range q.Headers {
			headers[h.Name] = h.Value
		}
		c.requests = append(c.requests, []any{q.From, q.To, q.Listener, q.Direction(), q.Method, q.Path, q.Host, headers})
	}
	return nil
}

func (c *casbinEnforcer) allows(i int) (bool, error) { return c.enforcer.Enforce(c.requests[i]...) }
