package testserver_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"estenroll/csr"
	"estenroll/est"
	"estenroll/testserver"
)

// run runs a foreign tool in a directory and returns its output.
func run(t *testing.T, dir, name string, args ...string) []byte {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v: run \"make deps\"", err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Dir = dir
	output, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, output)
	}
	return output
}

func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func pemOf(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

// Both of libcoap's clients fetch the CA certificates and enrol a CSR that
// OpenSSL made, in blocks of every size; OpenSSL verifies what came of it.
func TestForeignClients(t *testing.T) {
	t.Parallel()
	for _, client := range []string{"coap-client-openssl", "coap-client-gnutls"} {
		for _, size := range []int{64, 128, 256, 512, 1024} {
			t.Run(client+"/"+strconv.Itoa(size), func(t *testing.T) {
				t.Parallel()
				server := start(t, testserver.Config{})
				dir := t.TempDir()
				run(t, dir, "openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem")
				// Names enough for two blocks of every size, both ways.
				names := "subjectAltName=IP:192.0.2.1"
				for i := range 50 {
					names += fmt.Sprintf(",DNS:interface-%d.device-1.example", i)
				}
				run(t, dir, "openssl", "req", "-new", "-key", "key.pem", "-subj", "/O=Example/CN=device-1",
					"-addext", names, "-outform", "DER", "-out", "csr.der")
				csr, err := os.ReadFile(filepath.Join(dir, "csr.der"))
				if err != nil {
					t.Fatal(err)
				}
				factory, err := server.IssueIDevID(testserver.IDevIDRequest{CSR: csr})
				if err != nil {
					t.Fatal(err)
				}
				writeFile(t, filepath.Join(dir, "idevid.pem"), pemOf(factory))
				writeFile(t, filepath.Join(dir, "ca.pem"), pemOf(server.Root()))
				common := []string{"-v", "7", "-B", "20", "-b", strconv.Itoa(size), "-c", "idevid.pem", "-j", "key.pem", "-C", "ca.pem"}

				run(t, dir, client, append(common, "-A", "281", "-o", "crts.p7", server.URI()+"/.well-known/est/crts")...)
				crts := run(t, dir, "openssl", "pkcs7", "-inform", "DER", "-in", "crts.p7", "-print_certs")
				writeFile(t, filepath.Join(dir, "crts.pem"), crts)
				if got := bytes.Count(crts, []byte("BEGIN CERTIFICATE")); got != 2 {
					t.Errorf("crts: %d certificates, want 2:\n%s", got, crts)
				}

				log := run(t, dir, client, append(common, "-m", "post", "-t", "286", "-A", "281", "-f", "csr.der", "-o", "sen.p7",
					server.URI()+"/.well-known/est/sen")...)
				for _, block := range []string{fmt.Sprintf("Block1:1/_?M?/?%d", size), fmt.Sprintf("Block2:1/_?M?/?%d", size)} {
					if !regexp.MustCompile(block).Match(log) {
						t.Errorf("no %s in the client's log:\n%s", block, log)
					}
				}
				issued := run(t, dir, "openssl", "pkcs7", "-inform", "DER", "-in", "sen.p7", "-print_certs")
				writeFile(t, filepath.Join(dir, "issued.pem"), issued)
				run(t, dir, "openssl", "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", "ca.pem", "-untrusted", "crts.pem", "issued.pem")
				asked := run(t, dir, "openssl", "req", "-inform", "DER", "-in", "csr.der", "-noout", "-pubkey")
				got := run(t, dir, "openssl", "x509", "-in", "issued.pem", "-noout", "-pubkey")
				if !bytes.Equal(got, asked) {
					t.Errorf("public key: got %s, want %s", got, asked)
				}
				if got := len(server.Issuances()); got != 1 {
					t.Errorf("issued %d, want 1", got)
				}
			})
		}
	}
}

// foreigner asks for an operation as a program that shares no code with ours does. It
// leaves the answer as DER in the file out.der, or its two parts in part1 and part2.
type foreigner struct {
	operations []est.Operation
	ask        func(v *foreignVisit, operation est.Operation, certificate string)
}

// foreignVisit is one program's: a directory, and a server of its own.
type foreignVisit struct {
	*testing.T
	dir    string
	server *testserver.Server
}

func (v *foreignVisit) run(name string, args ...string) []byte {
	v.Helper()
	return run(v.T, v.dir, name, args...)
}

func (v *foreignVisit) write(name string, data []byte) {
	writeFile(v.T, filepath.Join(v.dir, name), data)
}

func (v *foreignVisit) read(name string) []byte {
	v.Helper()
	data, err := os.ReadFile(filepath.Join(v.dir, name))
	if err != nil {
		v.Fatal(err)
	}
	return data
}

// httpsOperations are the operations of RFC 7030, which has none like skc.
var httpsOperations = slices.DeleteFunc(slices.Clone(testserver.Operations), func(o est.Operation) bool { return o == est.ServerKeyGenCert })

var foreigners = map[string]foreigner{
	"coap-client-openssl":       {testserver.Operations, coapClient("coap-client-openssl")},
	"coap-client-gnutls":        {testserver.Operations, coapClient("coap-client-gnutls")},
	"curl, TLS 1.2":             {httpsOperations, curl("--tls-max", "1.2")},
	"curl, TLS 1.3":             {httpsOperations, curl("--tlsv1.3")},
	"openssl s_client, TLS 1.2": {httpsOperations, sClient("-tls1_2")},
	"openssl s_client, TLS 1.3": {httpsOperations, sClient("-tls1_3")},
}

// Each operation, asked at each door by programs that share no code with ours, and
// what they got judged by OpenSSL. The CSRs and the answers take several blocks.
func TestForeignOperations(t *testing.T) {
	t.Parallel()
	attributes, err := csr.Attributes{csr.WantChallengePassword()}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, program := range foreigners {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := startHTTPS(t, testserver.Config{Labels: []string{"factory-2"}, CSRAttributes: attributes, ServerKeyGen: true})
			dir := files(t, server)
			for _, operation := range program.operations {
				if !t.Run(string(operation), func(t *testing.T) {
					v := &foreignVisit{t, dir, server}
					judge, has := judges[operation]
					if !has {
						t.Fatal("nobody judges it")
					}
					certificate := "idevid.pem"
					if operation == est.SimpleReenroll {
						certificate = "issued.pem"
					}
					program.ask(v, operation, certificate)
					judge(v, attributes)
				}) {
					return
				}
			}
			var issued, want []est.Operation
			for _, event := range server.Issuances() {
				if issued = append(issued, event.Operation); !strings.Contains(event.Path, "/factory-2/") {
					t.Errorf("%s: asked at %s, without the label", event.Operation, event.Path)
				}
			}
			for _, operation := range program.operations {
				if !operation.Asks() {
					want = append(want, operation)
				}
			}
			if !slices.Equal(issued, want) {
				t.Errorf("issued for %q, want %q", issued, want)
			}
		})
	}
}

// judges have OpenSSL judge an answer.
var judges = map[est.Operation]func(v *foreignVisit, attributes []byte){
	est.CACerts: func(v *foreignVisit, _ []byte) {
		certs := v.run("openssl", "pkcs7", "-inform", "DER", "-in", "out.der", "-print_certs")
		if got := bytes.Count(certs, []byte("BEGIN CERTIFICATE")); got != 2 {
			v.Errorf("%d certificates, want 2:\n%s", got, certs)
		}
		v.write("crts.pem", certs)
	},
	est.SimpleEnroll:   func(v *foreignVisit, _ []byte) { v.enrolled("out.der", "issued.pem", v.requested()) },
	est.SimpleReenroll: func(v *foreignVisit, _ []byte) { v.enrolled("out.der", "renewed.pem", v.requested()) },
	est.CSRAttrs: func(v *foreignVisit, attributes []byte) {
		if text := v.run("openssl", "asn1parse", "-inform", "DER", "-in", "out.der"); !bytes.Contains(text, []byte("OBJECT            :challengePassword")) || !bytes.Equal(v.read("out.der"), attributes) {
			v.Errorf("got\n%s", text)
		}
	},
	est.ServerKeyGen: func(v *foreignVisit, _ []byte) { v.enrolled("part2", "generated.pem", v.generated()) },
	est.ServerKeyGenCert: func(v *foreignVisit, _ []byte) {
		v.write("generated.pem", v.run("openssl", "x509", "-inform", "DER", "-in", "part2"))
		v.verified("generated.pem", v.generated())
	},
}

// requested is the public key of the CSR.
func (v *foreignVisit) requested() []byte {
	return v.run("openssl", "req", "-inform", "DER", "-in", "csr.der", "-noout", "-pubkey")
}

// generated is the public key of the private one that came.
func (v *foreignVisit) generated() []byte {
	v.run("openssl", "pkey", "-inform", "DER", "-in", "part1", "-noout", "-check")
	return v.run("openssl", "pkey", "-inform", "DER", "-in", "part1", "-pubout")
}

// enrolled judges a PKCS#7 with the certificate alone.
func (v *foreignVisit) enrolled(pkcs7, pem string, key []byte) {
	v.Helper()
	v.write(pem, v.run("openssl", "pkcs7", "-inform", "DER", "-in", pkcs7, "-print_certs"))
	v.verified(pem, key)
}

func (v *foreignVisit) verified(pem string, key []byte) {
	v.Helper()
	if got := bytes.Count(v.read(pem), []byte("BEGIN CERTIFICATE")); got != 1 {
		v.Errorf("%d certificates, want 1", got)
	}
	v.run("openssl", "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", "ca.pem", "-untrusted", "crts.pem", pem)
	if got := v.run("openssl", "x509", "-in", pem, "-noout", "-pubkey"); !bytes.Equal(got, key) {
		v.Errorf("public key: got %s, want %s", got, key)
	}
}

// splitMultipartCore writes the representations of a multipart-core, by the CBOR of
// somebody else, and shows their content-formats.
const splitMultipartCore = `my $all = decode_cbor $_; for (1 .. @$all / 2) { print "$all->[2*$_-2] "; open my $f, ">", "part$_"; print $f $all->[2*$_-1] }`

// coapClient is one of libcoap's.
func coapClient(program string) func(*foreignVisit, est.Operation, string) {
	accept := map[est.Operation]est.ContentFormat{
		est.CACerts: est.ContentFormatPKCS7CertsOnly, est.SimpleEnroll: est.ContentFormatPKCS7CertsOnly, est.SimpleReenroll: est.ContentFormatPKCS7CertsOnly,
		est.CSRAttrs: est.ContentFormatCSRAttrs, est.ServerKeyGen: est.ContentFormatMultipartCore, est.ServerKeyGenCert: est.ContentFormatMultipartCore,
	}
	formats := map[est.Operation]string{est.ServerKeyGen: "284 281 ", est.ServerKeyGenCert: "284 287 "}
	return func(v *foreignVisit, operation est.Operation, certificate string) {
		args := []string{"-v", "7", "-B", "20", "-b", "64", "-c", certificate, "-j", "key.pem", "-C", "ca.pem", "-A", fmt.Sprint(accept[operation]), "-o", "out.der"}
		blocks := []string{"Block2:1/_?M?/?64"}
		switch {
		case operation == est.CSRAttrs:
			blocks = nil // it is short
		case !operation.Asks():
			args, blocks = append(args, "-m", "post", "-t", "286", "-f", "csr.der"), append(blocks, "Block1:1/_?M?/?64")
		}
		log := v.run(program, append(args, v.server.URI()+"/.well-known/est/factory-2/"+operation.ShortPath())...)
		for _, block := range blocks {
			if !regexp.MustCompile(block).Match(log) {
				v.Errorf("no %s in the client's log:\n%s", block, log)
			}
		}
		if want := formats[operation]; want != "" {
			if got := v.run("perl", "-MCBOR::XS=decode_cbor", "-0777", "-ne", splitMultipartCore, "out.der"); string(got) != want {
				v.Errorf("formats %s, want %s", got, want)
			}
		}
	}
}

func curl(version ...string) func(*foreignVisit, est.Operation, string) {
	return func(v *foreignVisit, operation est.Operation, certificate string) {
		args := append([]string{"--silent", "--show-error", "--fail", "--include", "--http1.1", "--cacert", "ca.pem", "-o", "answer.http"}, version...)
		if !operation.Asks() {
			args = append(args, "--cert", certificate, "--key", "key.pem", "-H", "Content-Type: application/pkcs10", "-H", "Content-Transfer-Encoding: base64", "--data-binary", "@csr.b64")
		}
		v.run("curl", append(args, v.server.HTTPSURI()+"/.well-known/est/factory-2/"+string(operation))...)
		v.decode(operation)
	}
}

func sClient(version string) func(*foreignVisit, est.Operation, string) {
	return func(v *foreignVisit, operation est.Operation, certificate string) {
		request := fmt.Sprintf("GET /.well-known/est/factory-2/%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", operation)
		if !operation.Asks() {
			body := v.read("csr.b64")
			request = fmt.Sprintf("POST /.well-known/est/factory-2/%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/pkcs10\r\n"+
				"Content-Transfer-Encoding: base64\r\nContent-Length: %d\r\n\r\n%s", operation, len(body), body)
		}
		v.write("request.http", []byte(request))
		v.run("sh", "-c", `openssl s_client "$@" <request.http >answer.http`, "sh", "-quiet", version, "-connect", strings.TrimPrefix(v.server.HTTPSURI(), "https://"),
			"-CAfile", "ca.pem", "-verify_return_error", "-verify_ip", "127.0.0.1", "-cert", certificate, "-key", "key.pem")
		if answer := v.read("answer.http"); !bytes.HasPrefix(answer, []byte("HTTP/1.1 200 OK\r\n")) {
			v.Fatalf("got %s", answer)
		}
		v.decode(operation)
	}
}

// decode takes an answer of HTTP apart: munpack the multipart, sed and OpenSSL others.
func (v *foreignVisit) decode(operation est.Operation) {
	v.Helper()
	if operation == est.ServerKeyGen {
		if got, want := v.run("munpack", "-f", "-t", "answer.http"), "part1 (application/pkcs8)\npart2 (application/pkcs7-mime)\n"; strings.ReplaceAll(string(got), "\r", "") != want {
			v.Errorf("munpack: got %s, want %s", got, want)
		}
		return
	}
	v.run("sh", "-c", `sed '1,/^\r*$/d' answer.http | tr -d '\r\n' | openssl base64 -d -A -out out.der`)
}
