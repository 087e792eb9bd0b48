package main

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/cedar-policy/cedar-go"

	"github.com/narthex-id/narthex/integration/bench/rulemix"
)

// cedarGo has a policy for each rule: exact identities in its scope, where
// cedar-go asks them first, groups as entities, HTTP methods as actions, and
// the rest in its conditions, with `like` for patterns. cedar.Authorize asks
// each policy of a set; there is no index.
type cedarGo struct {
	groups   []rulemix.Group // those of the rules, and who is revoked
	policies *cedar.PolicySet
	entities cedar.EntityMap
	requests []cedar.Request
}

const revokedGroup = "revoked"

func (c *cedarGo) write(m *rulemix.Mix) ([]byte, error) {
	c.groups = append(m.Groups, rulemix.Group{Name: revokedGroup, IDs: m.Revoked})
	var b bytes.Buffer
	for _, side := range []struct{ variable, text string }{{"principal", "context.from"}, {"resource", "context.to"}} {
		domain := "spiffe://" + m.Ceiling.Domain
		fmt.Fprintf(&b, "forbid (principal, action, resource) when { %s in Group::%q };\n", side.variable, revokedGroup)
		fmt.Fprintf(&b, "forbid (principal, action, resource) when { %s && !(%s) };\n",
			likeCedar(side.text, domain+"/**"), likeCedar(side.text, domain+m.Ceiling.Path))
	}
	for i := range m.Rules {
		writeCedar(&b, &m.Rules[i])
	}
	return b.Bytes(), nil
}

func writeCedar(b *bytes.Buffer, r *rulemix.Rule) {
	principal, from := scopeCedar("principal", "context.from", r.From)
	resource, to := scopeCedar("resource", "context.to", r.To)
	conditions := append(from, to...)
	if r.On != "" {
		conditions = append(conditions, fmt.Sprintf("context.listener == %q", r.On))
	}
	if r.At != "" {
		conditions = append(conditions, fmt.Sprintf("context.direction == %q", r.At))
	}
	action := "action"
	if r.Conditions() {
		var methods []string
		for _, m := range r.Methods {
			methods = append(methods, fmt.Sprintf("Action::%q", m))
		}
		action = "action in [" + strings.Join(methods, ", ") + "]"
		conditions = append(conditions, anyCedar("context.path", r.Paths, pathCedar))
	}
	if r.Hosts != nil {
		conditions = append(conditions, anyCedar("context.host", r.Hosts, likeCedar))
	}
	if r.Header != "" {
		conditions = append(conditions, fmt.Sprintf("context.headers has %q && [%s].contains(context.headers[%[1]q])", r.Header, `"`+strings.Join(r.Values, `", "`)+`"`))
	}
	effect := "forbid"
	if r.Allow {
		effect = "permit"
	}
	fmt.Fprintf(b, "@id(%q)\n%s (%s, %s, %s)", r.ID, effect, principal, action, resource)
	if len(conditions) > 0 {
		fmt.Fprintf(b, " when { %s }", strings.Join(conditions, " && "))
	}
	b.WriteString(";\n")
}

// scopeCedar returns one side of a policy's scope, and the condition where the
// scope cannot say it.
func scopeCedar(variable, text, pattern string) (scope string, conditions []string) {
	group, isGroup := strings.CutPrefix(pattern, "group:")
	switch {
	case pattern == "":
		return variable, nil
	case isGroup:
		return fmt.Sprintf("%s in Group::%q", variable, group), nil
	case strings.Contains(pattern, "*"):
		return variable, []string{likeCedar(text, pattern)}
	}
	return fmt.Sprintf("%s == Workload::%q", variable, pattern), nil
}

// likeCedar compares a text with a pattern. The * of Cedar covers slashes.
func likeCedar(text, pattern string) string {
	pattern = strings.ReplaceAll(pattern, "**", "*")
	if !strings.Contains(pattern, "*") {
		return fmt.Sprintf("%s == %q", text, pattern)
	}
	return fmt.Sprintf("%s like %q", text, pattern)
}

// pathCedar compares a path. Where a pattern ends in {id}, there is one
// segment.
func pathCedar(text, pattern string) string {
	if parent, ok := strings.CutSuffix(pattern, "/{id}"); ok {
		return fmt.Sprintf("(%s like %q && !(%[1]s like %[3]q))", text, parent+"/*", parent+"/*/*")
	}
	return likeCedar(text, pattern)
}

func anyCedar(text string, patterns []string, like func(text, pattern string) string) string {
	var list []string
	for _, p := range patterns {
		list = append(list, like(text, p))
	}
	return "(" + strings.Join(list, " || ") + ")"
}

func (c *cedarGo) load(text []byte) (err error) {
	if c.policies, err = cedar.NewPolicySetFromBytes("rules.cedar", text); err != nil {
		return err
	}
	parents := map[string][]cedar.EntityUID{}
	for i := range c.groups {
		for _, id := range c.groups[i].IDs {
			parents[id] = append(parents[id], cedar.NewEntityUID("Group", cedar.String(c.groups[i].Name)))
		}
	}
	c.entities = make(cedar.EntityMap, len(parents))
	for id, groups := range parents {
		uid := workloadCedar(id)
		c.entities[uid] = cedar.Entity{UID: uid, Parents: cedar.NewEntityUIDSet(groups...)}
	}
	return nil
}

func workloadCedar(id string) cedar.EntityUID {
	return cedar.NewEntityUID("Workload", cedar.String(id))
}

func (c *cedarGo) prepare(requests []rulemix.Request) error {
	for i := range requests {
		q := &requests[i]
		context := cedar.RecordMap{
			"from": cedar.String(q.From), "to": cedar.String(q.To),
			"listener": cedar.String(q.Listener), "direction": cedar.String(q.Direction()),
		}
		method := "connect"
		if q.Method != "" {
			method = q.Method
			headers := cedar.RecordMap{}
			for _, h := range q.Headers {
				headers[cedar.String(h.Name)] = cedar.String(h.Value)
			}
			context["host"], context["path"], context["headers"] = cedar.String(q.Host), cedar.String(q.Path), cedar.NewRecord(headers)
		}
		c.requests = append(c.requests, cedar.Request{
			Principal: workloadCedar(q.From), Resource: workloadCedar(q.To),
			Action: cedar.NewEntityUID("Action", cedar.String(method)), Context: cedar.NewRecord(context),
		})
	}
	return nil
}

func (c *cedarGo) allows(i int) (bool, error) {
	decision, diagnostic := cedar.Authorize(c.policies, c.entities, c.requests[i])
	if len(diagnostic.Errors) > 0 {
		return false, fmt.Errorf("%v", diagnostic.Errors[0])
	}
	return bool(decision), nil
}
