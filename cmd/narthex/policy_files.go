package main

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/proxy/policy"
)

// policyFiles is -f and -c: where a policy command finds its rule files.
type policyFiles struct {
	patterns []string
	config   string
}

func (f *policyFiles) register(cmd *cobra.Command) {
	cmd.Flags().StringArrayVarP(&f.patterns, "file", "f", nil, "a rule file, or a pattern of them in quotes; may be given several times")
	cmd.Flags().StringVarP(&f.config, "config", "c", "", "take the rule files that this narthex.yaml names")
}

// expand returns the files.
func (f *policyFiles) expand() ([]string, error) {
	switch {
	case f.config == "" && len(f.patterns) == 0:
		return nil, usageError{errors.New("no rules: give -f FILE, or -c narthex.yaml")}
	case f.config != "" && len(f.patterns) > 0:
		return nil, usageError{errors.New("give -f or -c, not both")}
	case f.config == "":
		return policy.Expand(f.patterns...)
	}
	c, err := config.Load(f.config)
	if err != nil {
		return nil, err
	}
	if !c.HasProxy() {
		return nil, fmt.Errorf("%s has no proxy, and so no rules", f.config)
	}
	return c.PolicyFiles()
}

// fill takes from narthex.yaml what a question about one of its listeners
// leaves out.
func (f *policyFiles) fill(q *policy.Question) error {
	if f.config == "" || q.On == "" {
		return nil
	}
	c, err := config.Load(f.config)
	if err != nil {
		return err
	}
	if !c.HasProxy() {
		return nil // expand says so
	}
	var names []string
	for i := range c.Proxy.Listeners {
		l := &c.Proxy.Listeners[i]
		if names = append(names, l.Name); l.Name != q.On {
			continue
		}
		if l.Direction == policy.Outbound.String() {
			q.At = l.Direction
			return nil
		}
		if q.To == "" && l.Identity != nil && !l.Identity.SPIFFEID.IsZero() {
			q.To = l.Identity.SPIFFEID.String()
		}
		if _, port, err := net.SplitHostPort(string(l.Bind)); err == nil && q.Port == 0 {
			if n, err := strconv.ParseUint(port, 10, 16); err == nil {
				q.Port = uint16(n)
			}
		}
		return nil
	}
	if extAuthzNamed(c, q.On) != nil {
		return nil // where Envoy listens, and as whom, is Envoy's
	}
	for i := range c.Proxy.ExtAuthz {
		names = append(names, c.Proxy.ExtAuthz[i].Name)
	}
	return usageError{fmt.Errorf("--on %q: %s has no such listener; it has %s", q.On, f.config, strings.Join(names, ", "))}
}

// given reports whether any flag was.
func (f *policyFiles) given() bool { return f.config != "" || len(f.patterns) > 0 }

// read reads the policy; its tests are not run.
func (f *policyFiles) read() (*policy.Policy, error) {
	files, err := f.expand()
	if err != nil {
		return nil, err
	}
	return policy.Read(files...)
}

// unanswered is for the errors of commands whose exit status 1 is an answer:
// that there is none is 2.
func unanswered(cmd *cobra.Command, err error) error {
	if usage := (usageError{}); errors.As(err, &usage) {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s: %v%s\n", cmd.CommandPath(), err, asWhom(err))
	return exitError{exitUsage}
}
