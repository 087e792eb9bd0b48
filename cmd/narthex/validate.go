package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/narthex-id/narthex/internal/fetch"
)

func newValidate() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "validate",
		Short:   "Have the Workload API validate a token",
		Example: `  narthex validate jwt --audience orders --token-file token`,
		RunE:    whichCommand,
	}
	cmd.AddCommand(newValidateJWT())
	return cmd
}

func newValidateJWT() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "jwt --audience AUDIENCE {--token-file FILE | -}",
		Short: "Have the Workload API validate a JWT-SVID",
		Long: `Asks the Workload API whether a JWT-SVID is good for an audience, and prints whose
it is, until when, and its claims. The token is read from a file, or with - from
standard input. A token that is an argument is seen by every process of the host:
it is taken, with a warning.
Exit status: 0 when it is valid, 1 when it is not, 2 when the call cannot be made
sense of, 3 when nobody answers within --timeout.`,
		Example: `  narthex validate jwt --audience orders --token-file /run/tokens/jwt_svid.token
  pbpaste | narthex validate jwt --audience orders -`,
	}
	var api apiFlags
	api.register(cmd)
	f := cmd.Flags()
	audience := f.String("audience", "", "whom the token has to be for (required)")
	file := f.String("token-file", "", "file with the token")
	format := f.String("format", "text", "text or json")
	completeWords(cmd, "format", "text", "json")
	cmd.Args = cobra.MaximumNArgs(1)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case *format != "text" && *format != "json":
			return usageError{fmt.Errorf("--format %q: want text or json", *format)}
		case *audience == "":
			return usageError{errors.New("--audience is missing: a token is good for one audience and not for another")}
		}
		token, err := readToken(cmd, *file, args)
		if err != nil {
			return err
		}
		address, err := api.where()
		if err != nil {
			return err
		}
		client, err := fetch.Dial(address)
		if err != nil {
			return usageError{err}
		}
		defer client.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), api.timeout)
		defer cancel()
		svid, err := client.Validate(ctx, token, *audience)
		if err != nil {
			return unavailable(cmd, err)
		}
		return printToken(cmd.OutOrStdout(), svid, *format)
	}
	return cmd
}

// readToken returns the token of the one place that is named.
func readToken(cmd *cobra.Command, file string, args []string) (string, error) {
	var from io.Reader
	switch {
	case file != "" && len(args) > 0:
		return "", usageError{errors.New("--token-file and an argument both are a token: give one of them")}
	case file != "":
		f, err := os.Open(file)
		if err != nil {
			return "", err
		}
		defer f.Close()
		from = f
	case len(args) == 0:
		return "", usageError{errors.New("no token: give --token-file FILE, or - and the token on standard input")}
	case args[0] == "-":
		from = cmd.InOrStdin()
	default:
		fmt.Fprintln(cmd.ErrOrStderr(), "narthex validate jwt: every process of this host can read a token that is an argument: prefer --token-file or -")
		from = strings.NewReader(args[0])
	}
	data, err := io.ReadAll(io.LimitReader(from, fetch.MaxToken+1))
	if err != nil {
		return "", fmt.Errorf("read the token: %w", err)
	}
	token := strings.TrimSpace(string(data))
	switch {
	case len(data) > fetch.MaxToken:
		return "", fmt.Errorf("read the token: more than %d bytes: is it a token at all?", fetch.MaxToken)
	case token == "":
		return "", errors.New("read the token: there is none")
	}
	return token, nil
}

func printToken(w io.Writer, svid *jwtsvid.SVID, format string) error {
	if format == "json" {
		return json.NewEncoder(w).Encode(struct {
			SPIFFEID string         `json:"spiffe_id"`
			Audience []string       `json:"audience"`
			NotAfter time.Time      `json:"not_after"`
			Claims   map[string]any `json:"claims"`
		}{svid.ID.String(), svid.Audience, svid.Expiry, svid.Claims})
	}
	claims, err := json.MarshalIndent(svid.Claims, "  ", "  ")
	if err != nil {
		return fmt.Errorf("print the claims: %w", err)
	}
	_, err = fmt.Fprintf(w, "%s\n  audience  %s\n  until     %s, %s\n  claims    %s\n",
		svid.ID, strings.Join(quoted(svid.Audience), ", "), svid.Expiry.UTC().Format(time.RFC3339), timeLeft(svid.Expiry), claims)
	return err
}
