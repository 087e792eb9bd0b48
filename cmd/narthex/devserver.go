package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/narthex-id/narthex/internal/config"
	"github.com/narthex-id/narthex/internal/devserver"
)

func newDevServer() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dev-server -f entries.yaml",
		Short: "Run the embedded development server (not for production)",
		Long: `Speaks the SPIRE Server API to agents on loopback, over a CA and a list of
entries in a file. It is not for production: it is there to try things out and to
test against, its keys are in memory or in a plain directory, and nobody can
administer it. In production, run SPIRE Server.

On start it writes the trust bundle and a join token to the directory that --out
names; with them an agent can attest. SIGHUP reads the entries again.`,
		Example: `  narthex dev-server -f entries.yaml --out ./dev
  narthex agent -c agent.yaml      # with bundle: {file: dev/bundle.pem}, join_token: {token_file: dev/join-token}`,
	}
	file := cmd.Flags().StringP("file", "f", "", "trust domain and entries (required)")
	out := cmd.Flags().String("out", ".", "directory to write bundle.pem and join-token to")
	keep := cmd.Flags().String("dir", "", "directory to keep the CA in across restarts (default: a new CA on each start)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *file == "" {
			return usageError{errors.New("no entries: give -f entries.yaml")}
		}
		cfg, err := devserver.LoadFile(*file)
		if err != nil {
			return err
		}
		log := newLogger("narthex.dev-server", config.Log{Level: "info", Format: "text"})
		cfg.Dir, cfg.Log = *keep, log
		server, err := devserver.New(cfg)
		if err != nil {
			return err
		}
		if err := writeDevFiles(*out, server); err != nil {
			return errors.Join(err, server.Close())
		}
		ctx, hangups, stop := untilSignal(cmd.Context(), nil)
		defer stop()
		served := make(chan error, 1)
		go func() { served <- server.Serve(ctx) }()
		for {
			select {
			case err := <-served:
				return err
			case <-hangups:
				again, err := devserver.LoadFile(*file)
				if err == nil {
					err = server.SetEntries(again.Entries)
				}
				if err != nil {
					log.Error("cannot read the entries again; those before stay", "error", err)
					continue
				}
				log.Info("read the entries again", "entries", len(again.Entries))
			}
		}
	}
	return cmd
}

func writeDevFiles(dir string, server *devserver.Server) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("write bundle and join token: %w", err)
	}
	for name, data := range map[string][]byte{"bundle.pem": server.BundlePEM(), "join-token": []byte(server.JoinToken() + "\n")} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return fmt.Errorf("write bundle and join token: %w", err)
		}
	}
	fmt.Printf("listening on %s; wrote %s and %s\n", server.Addr(), filepath.Join(dir, "bundle.pem"), filepath.Join(dir, "join-token"))
	return nil
}
