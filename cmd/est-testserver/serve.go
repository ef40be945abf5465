package main

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"estenroll/internal/durable"
	"estenroll/testserver"
)

// Limits of files, in bytes.
const (
	attributesLimit = 64 << 10
	keyLimit        = 16 << 10
)

func serveCommand() *cobra.Command {
	var (
		cfg      testserver.Config
		faults   []string
		wanted   string
		writeDir string
		keks     []string // ID=FILE
		rsaKeys  []string // ID=FILE
		password string   // file
		psks     string   // file
		verbose  bool
	)
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the server until SIGINT or SIGTERM",
		Long: `Run the server until SIGINT or SIGTERM.

` + warning + `

When the server answers, a line for each of its doors is printed to standard output:

  listening coaps://127.0.0.1:5684
  listening https://127.0.0.1:8443      with --listen-https
  linked coaps://127.0.0.1:61617        with --listen-linked

Files in --write-dir, all PEM, written before that line:

  ca.pem          the EST CA's root: what a client trusts (Implicit TA)
  issuing.pem     the intermediate CA; the root itself with --single-ca
  server.pem      the server's certificate and the intermediate CA
  factory-ca.pem  the CA of the IDevIDs

The resources are crts, sen, sren, with --csr-attributes att and with
--server-keygen skg and skc below /.well-known/est and, the same ones, below
/e/plz, which a client has to discover: GET /.well-known/core?rt=ace.est*
(RFC 9148 §4.1). With --listen-linked the latter are at that door alone, and the
links lead there. With --label, also below /.well-known/est/LABEL and
/e/plz/LABEL. Over HTTPS (RFC 7030) they are cacerts, simpleenroll,
simplereenroll, csrattrs and serverkeygen below /.well-known/est, and below
/.well-known/est/LABEL, for clients with a certificate or, with --http-user, a
password. Key usage and extended key usage are issued as they are asked for.
A key is encrypted (RFC 7030 §4.4.1) for the key that a CSR names, if that is one
of --server-keygen-kek and --server-keygen-rsa, and the CSR is refused if it is not.
Each line of --record is a JSON object: time, kind (issuance, replay, idevid),
operation, path, client_sha256, client_subject, psk_identity, csr_sha256, public_key_sha256,
serial, subject, certificate_sha256, faults.

Faults (--fault, repeatable; "est-testserver fault" changes them while the server runs):

` + testserver.FaultsHelp,
		Example: "  est-testserver serve --listen 127.0.0.1:0 --write-dir ca --control ca/control --record ca/record.jsonl",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			fmt.Fprintln(cmd.ErrOrStderr(), "est-testserver: "+warning)
			if cfg.Faults, err = testserver.ParseFaults(faults); err != nil {
				return err
			}
			if cfg.Lifetime == 0 || cfg.Backdate == 0 || cfg.ReplayWindow == 0 {
				return errors.New("--lifetime, --backdate and --replay-window are at least 1s") // a zero Config field is a default
			}
			if wanted != "" {
				if cfg.CSRAttributes, err = readAttributes(wanted); err != nil {
					return err
				}
			}
			for _, named := range keks {
				if cfg.EnvelopeKeys, err = appendEnvelopeKey(cfg.EnvelopeKeys, named, readSecret); err != nil {
					return fmt.Errorf("--server-keygen-kek: %w", err)
				}
			}
			for _, named := range rsaKeys {
				if cfg.EnvelopeKeys, err = appendEnvelopeKey(cfg.EnvelopeKeys, named, readRSAKey); err != nil {
					return fmt.Errorf("--server-keygen-rsa: %w", err)
				}
			}
			if verbose {
				cfg.Logger = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelDebug}))
			}
			if cfg.HTTPPassword, err = readPassword(password); err != nil {
				return err
			}
			if cfg.PSKs, err = readPSKs(psks); err != nil {
				return err
			}
			// Before the sockets exist: a signal from here on ends the server cleanly.
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			if writeDir != "" { // the control socket may be in it
				if err := os.MkdirAll(writeDir, 0o755); err != nil {
					return fmt.Errorf("write certificates: %w", err)
				}
			}
			server, err := testserver.New(cfg)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, server.Close()) }()
			if err := writeCertificates(writeDir, server); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), "listening "+server.URI())
			if uri := server.HTTPSURI(); uri != "" {
				fmt.Fprintln(cmd.OutOrStdout(), "listening "+uri)
			}
			if uri := server.LinkedURI(); uri != "" {
				fmt.Fprintln(cmd.OutOrStdout(), "linked "+uri)
			}
			select {
			case <-ctx.Done():
			case <-server.Done():
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&cfg.Listen, "listen", "127.0.0.1:5684", "UDP `HOST:PORT`; port 0 takes a free one")
	flags.StringVar(&cfg.ListenLinked, "listen-linked", "", "UDP `HOST:PORT` of a second CoAPs door, which the links of discovery lead to")
	flags.StringVar(&cfg.ListenHTTPS, "listen-https", "", "TCP `HOST:PORT` of a second door, EST over HTTPS")
	flags.BoolVar(&cfg.TLS12, "tls12", false, "speak TLS 1.2 only over HTTPS")
	flags.StringVar(&cfg.HTTPUser, "http-user", "", "`USER` that a CSR over HTTPS needs, by HTTP Basic, with a client certificate or without")
	flags.StringVar(&password, "http-password-file", "", "`FILE` with that user's password, in one line")
	flags.StringVar(&psks, "psk-file", "", "`FILE` with pre-shared keys that stand for client certificates over CoAPs, lines of identity:hexadecimal as psktool writes them")
	flags.BoolVar(&cfg.AllowNonLoopback, "allow-non-loopback", false, "permit addresses that other machines can reach")
	flags.StringSliceVar(&cfg.Names, "name", nil, "DNS `NAME` or IP address in the server's certificate, beside localhost, 127.0.0.1 and ::1")
	flags.StringVar(&writeDir, "write-dir", "", "write the CA certificates to this `DIR`, created if missing")
	flags.StringVar(&cfg.Control, "control", "", "`PATH` of a Unix socket to make for the commands idevid, fault and rollover")
	flags.StringVar(&cfg.Record, "record", "", "append every issuance to this `FILE` of JSON lines")
	flags.DurationVar(&cfg.Lifetime, "lifetime", 90*24*time.Hour, "`DURATION` an issued certificate lives from now on, in whole seconds")
	flags.DurationVar(&cfg.Backdate, "backdate", time.Minute, "`DURATION` before now that an issued certificate begins")
	flags.BoolVar(&cfg.SingleCA, "single-ca", false, "issue from the root, without an intermediate CA")
	flags.BoolVar(&cfg.AnswerChain, "answer-chain", false, "answer sen, sren and skg with the intermediate CA beside the certificate")
	flags.BoolVar(&cfg.AnswerRoot, "answer-root", false, "answer sen, sren and skg with the root CA beside the certificate")
	flags.IntVar(&cfg.OtherCAs, "other-cas", 0, "answer crts with `N` unrelated CAs too, a root and an intermediate of each, this server's own last")
	flags.StringSliceVar(&cfg.Labels, "label", nil, "EST `LABEL` to serve beside the resources without one")
	flags.StringVar(&wanted, "csr-attributes", "", "`FILE` with what att and csrattrs answer, DER or base64 (RFC 7030 §4.5, RFC 9908); without it there is neither")
	flags.BoolVar(&cfg.ServerKeyGen, "server-keygen", false, "answer skg, skc and serverkeygen: make the key too, of the kind of the CSR's (RFC 9148 §4.8, RFC 7030 §4.4)")
	flags.StringArrayVar(&keks, "server-keygen-kek", nil, "`ID=FILE`: encrypt the key for the AES key in FILE, 16, 24 or 32 bytes, where a CSR names it by ID, hexadecimal (DecryptKeyIdentifier)")
	flags.StringArrayVar(&rsaKeys, "server-keygen-rsa", nil, "`ID=FILE`: encrypt it for the RSA key in FILE, PEM, a public key or a certificate (AsymmetricDecryptKeyIdentifier)")
	flags.BoolVar(&cfg.RequirePoP, "require-pop", false, "refuse a CSR without a challengePassword that links it to its session (RFC 7030 §3.5), not with --raw")
	flags.DurationVar(&cfg.ReplayWindow, "replay-window", 24*time.Hour, "`DURATION` in which a repeated CSR gets the same certificate")
	flags.BoolVar(&cfg.NoReplay, "no-replay", false, "issue anew for every request")
	flags.StringArrayVar(&faults, "fault", nil, "`FAULT` to begin with, see above")
	flags.BoolVar(&cfg.Raw, "raw", false, "answer by a CoAP of its own that the fault message can get wrong")
	flags.IntVar(&cfg.BlockSize, "block-size", 1024, "largest block of an answer, `BYTES` 16 to 1024")
	flags.DurationVar(&cfg.AckTimeout, "ack-timeout", 2*time.Second, "`DURATION` before the first retransmission of a separate response")
	flags.BoolVarP(&verbose, "verbose", "v", false, "log the transport to standard error")
	cmd.MarkFlagsRequiredTogether("http-user", "http-password-file")
	return cmd
}

func readPassword(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	data, err := durable.ReadFile(path, 4<<10)
	if err != nil {
		return "", fmt.Errorf("read password: %w", err)
	}
	return strings.TrimRight(string(data), "\r\n"), nil
}

// appendEnvelopeKey adds the key that an argument names.
func appendEnvelopeKey(keys []testserver.EnvelopeKey, named string, read func(*testserver.EnvelopeKey, []byte) error) ([]testserver.EnvelopeKey, error) {
	digits, path, found := strings.Cut(named, "=")
	id, err := hex.DecodeString(digits)
	if !found || err != nil || len(id) == 0 {
		return nil, errors.New("want ID=FILE, where ID is hexadecimal")
	}
	data, err := durable.ReadFile(path, keyLimit)
	if err != nil {
		return nil, err
	}
	key := testserver.EnvelopeKey{ID: id}
	if err := read(&key, data); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return append(keys, key), nil
}

func readSecret(key *testserver.EnvelopeKey, data []byte) error {
	key.Secret = data // whose length New judges
	return nil
}

// readRSAKey reads a public key, or a certificate whose key "MUST either explicitly
// support keyTransport or … its use MUST be unrestricted" (RFC 7030 §4.4.1.2).
func readRSAKey(key *testserver.EnvelopeKey, data []byte) error {
	block, _ := pem.Decode(data)
	if block == nil {
		return errors.New("no PEM")
	}
	var public any
	var err error
	if block.Type == "CERTIFICATE" {
		var cert *x509.Certificate
		if cert, err = x509.ParseCertificate(block.Bytes); err == nil {
			if public = cert.PublicKey; cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageKeyEncipherment == 0 {
				err = errors.New("the certificate's key usage is not for key transport")
			}
		}
	} else {
		public, err = x509.ParsePKIXPublicKey(block.Bytes)
	}
	if err != nil {
		return err
	}
	var isRSA bool
	if key.Public, isRSA = public.(*rsa.PublicKey); !isRSA {
		return errors.New("not an RSA key")
	}
	return nil
}

// readPSKs reads lines of identity:key, the key in hexadecimal.
func readPSKs(path string) (map[string][]byte, error) {
	if path == "" {
		return nil, nil
	}
	data, err := durable.ReadFile(path, 64<<10)
	if err != nil {
		return nil, fmt.Errorf("read pre-shared keys: %w", err)
	}
	keys := map[string][]byte{}
	for n, line := range strings.Split(strings.TrimRight(string(data), "\r\n"), "\n") {
		identity, text, found := strings.Cut(strings.TrimRight(line, "\r"), ":")
		key, err := hex.DecodeString(text)
		if !found || identity == "" || err != nil || len(key) == 0 {
			return nil, fmt.Errorf("read pre-shared keys: %s: line %d: want identity:key, the key in hexadecimal", path, n+1)
		}
		keys[identity] = key
	}
	return keys, nil
}

// readAttributes reads DER, or the base64 of it that RFC 7030 and RFC 9908 print.
func readAttributes(path string) ([]byte, error) {
	data, err := durable.ReadFile(path, attributesLimit)
	if err != nil {
		return nil, fmt.Errorf("read CSR attributes: %w", err)
	}
	if der, err := base64.StdEncoding.DecodeString(string(data)); err == nil { // which skips line breaks
		return der, nil
	}
	return data, nil
}

func writeCertificates(dir string, server *testserver.Server) error {
	if dir == "" {
		return nil
	}
	for name, certs := range map[string][]*x509.Certificate{
		"ca.pem":         {server.Root()},
		"issuing.pem":    {server.Issuing()},
		"server.pem":     server.ServerChain(),
		"factory-ca.pem": {server.FactoryRoot()},
	} {
		var content []byte
		for _, cert := range certs {
			content = append(content, certificatePEM(cert)...)
		}
		if err := durable.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return fmt.Errorf("write certificates: %w", err)
		}
	}
	return nil
}

func certificatePEM(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}
