package main

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"

	"github.com/spf13/cobra"

	"estenroll/csr"
	"estenroll/internal/durable"
	"estenroll/testserver"
)

const inputLimit = 32 << 10 // bytes of a CSR or a public key

func idevidCommand() *cobra.Command {
	var (
		control          testserver.Control
		csrFile, keyFile string
		subject          string
		sans             []string
		out              string
		asPEM            bool
	)
	cmd := &cobra.Command{
		Use:   "idevid --control PATH {--csr FILE | --public-key FILE --subject DN} [--out FILE]",
		Short: "Have a running server's factory CA sign an IDevID",
		Long: `Have a running server's factory CA sign an IDevID: a factory credential that
does not expire (IEEE 802.1AR). Both kinds of input may be PEM or DER.

--csr takes a PKCS#10 request, whose signature is verified; subject and
subjectAltName are the request's unless --subject or --san are given.
--public-key takes a public key without any proof, as a factory reads it from
the token it has just filled.

A key pair made in a token (MODULE, "pkcs11:token=dev;object=idevid"):

  pkcs11-tool --module MODULE --token-label dev --login --keypairgen \
      --key-type EC:prime256v1 --label idevid --id 01
  openssl req -new -engine pkcs11 -keyform engine \
      -key 'pkcs11:token=dev;object=idevid;type=private' \
      -subj /CN=device-1 -outform DER -out idevid.csr
  est-testserver idevid --control ca/control --csr idevid.csr --out idevid.der
  pkcs11-tool --module MODULE --token-label dev --login --write-object idevid.der \
      --type cert --label idevid --id 01

or, without the request:

  pkcs11-tool --module MODULE --token-label dev --read-object --type pubkey \
      --label idevid --output-file idevid.pub
  est-testserver idevid --control ca/control --public-key idevid.pub \
      --subject CN=device-1 --out idevid.der`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req, err := idevidRequest(csrFile, keyFile, subject, sans)
			if err != nil {
				return err
			}
			cert, err := control.IssueIDevID(req)
			if err != nil {
				return err
			}
			content := cert.Raw
			if asPEM {
				content = certificatePEM(cert)
			}
			if out == "-" {
				_, err = cmd.OutOrStdout().Write(content)
				return err
			}
			return durable.WriteFile(out, content, 0o644)
		},
	}
	controlFlag(cmd, &control.Path)
	flags := cmd.Flags()
	flags.StringVar(&csrFile, "csr", "", "`FILE` with a PKCS#10 request")
	flags.StringVar(&keyFile, "public-key", "", "`FILE` with a public key (SubjectPublicKeyInfo)")
	flags.StringVar(&subject, "subject", "", "`DN` of the certificate (RFC 4514: \"serialNumber=1234,O=Example\"), instead of the request's")
	flags.StringArrayVar(&sans, "san", nil, "`SAN` of the certificate, instead of the request's: DNS:…, IP:…, URI:… or hwModuleName:OID;HEX")
	flags.StringVar(&out, "out", "-", "`FILE` for the certificate, - is standard output")
	flags.BoolVar(&asPEM, "pem", false, "write PEM instead of DER")
	cmd.MarkFlagsOneRequired("csr", "public-key")
	cmd.MarkFlagsMutuallyExclusive("csr", "public-key")
	return cmd
}

func idevidRequest(csrFile, keyFile, subject string, sans []string) (req testserver.IDevIDRequest, err error) {
	if csrFile != "" {
		// "NEW" is what OpenSSL's -newhdr and GnuTLS's certtool write.
		if req.CSR, err = readDER(csrFile, "CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"); err != nil {
			return req, err
		}
	}
	if keyFile != "" {
		der, err := readDER(keyFile, "PUBLIC KEY")
		if err != nil {
			return req, err
		}
		if req.PublicKey, err = x509.ParsePKIXPublicKey(der); err != nil {
			return req, fmt.Errorf("read %s: %w", keyFile, err)
		}
	}
	if subject != "" {
		if req.RawSubject, err = csr.ParseSubject(subject); err != nil {
			return req, err
		}
	}
	if len(sans) > 0 {
		var names csr.Template
		for _, text := range sans {
			san, err := csr.ParseSAN(text)
			if err != nil {
				return req, err
			}
			names.SANs = append(names.SANs, san)
		}
		extension, err := names.SANExtension()
		if err != nil {
			return req, err
		}
		req.SAN = &extension
	}
	return req, nil
}

// readDER reads a file that holds DER, or PEM of one of these types.
func readDER(path string, types ...string) ([]byte, error) {
	data, err := durable.ReadFile(path, inputLimit)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return data, nil
	}
	for _, name := range types {
		if block.Type == name {
			return block.Bytes, nil
		}
	}
	return nil, fmt.Errorf("read %s: PEM of type %q, not %q", path, block.Type, types[0])
}
