//go:build cgo

package pkcs11

// An internal test: the fields of the table's addresses are completed with the
// token's module and PIN.

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"estenroll/engine"
	"estenroll/engine/enginetest/softhsm"
)

// TestP11Tool has GnuTLS's p11tool judge what each address of the table selects in
// one token, and wants that this driver selects the same, by opening the token and
// listing, or differs for the reason that the table gives.
func TestP11Tool(t *testing.T) {
	token := tokenOfTable(t)
	fill := placeholders(t, token)
	opts := engine.Options{LockDir: filepath.Join(t.TempDir(), "locks")}
	agreed := 0
	for _, row := range uriTable {
		uri := fill.Replace(row.uri)
		if got := selected(t, token, uri, opts); got != row.selects {
			t.Errorf("%s: selects %s, want %s", uri, got, row.selects)
		}
		theirs := row.p11tool
		switch {
		case theirs == "":
			theirs = row.selects
			agreed++
		case theirs == row.selects, !strings.Contains(row.why, "§"):
			t.Errorf("%s: a difference from p11tool that is none, or has no clause: %q", uri, row.why)
		}
		if got := p11tool(t, token, uri); got != theirs {
			t.Errorf("%s: p11tool selects %s, the table says %s", uri, got, theirs)
		}
	}
	t.Logf("%d addresses: p11tool agrees in %d, and the table explains %d", len(uriTable), agreed, len(uriTable)-agreed)
}

// tokenOfTable makes the token that uriTable speaks of, with tools that are not ours.
func tokenOfTable(t *testing.T) *softhsm.Token {
	t.Helper()
	token := softhsm.New(t)
	token.Use(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(t.TempDir(), "data")
	_, errKey := token.GenerateEC("a key", "01ff")
	_, errSecret := token.Tool("--keygen", "--key-type", "AES:16", "--label", "secret", "--id", "02")
	errFile := os.WriteFile(data, []byte("data"), 0o600)
	_, errData := token.Tool("--write-object", data, "--type", "data", "--label", "some data")
	if err := errors.Join(errKey, errSecret, errFile, errData, token.WriteCertificate(der, "a key", "01ff"), token.WriteCertificate(der, "", "")); err != nil {
		t.Fatal(err)
	}
	return token
}

// placeholders asks pkcs11-tool for what the table leaves open.
func placeholders(t *testing.T, token *softhsm.Token) *strings.Replacer {
	t.Helper()
	list, err := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", token.ModulePath, "--list-slots").Output()
	if err != nil {
		t.Fatal(err)
	}
	slot := regexp.MustCompile(`Slot 0 \(0x([0-9a-f]+)\): (.*)`).FindStringSubmatch(string(list))
	serial := regexp.MustCompile(`serial num +: +(\S+)`).FindStringSubmatch(string(list))
	if slot == nil || serial == nil {
		t.Fatalf("pkcs11-tool says %s", list)
	}
	number, ok := new(big.Int).SetString(slot[1], 16)
	if !ok {
		t.Fatal(slot[1])
	}
	return strings.NewReplacer("{serial}", serial[1], "{slot}", number.String(), "{description}", strings.ReplaceAll(slot[2], " ", "%20"), "{module}", token.ModulePath)
}

// selected opens the token that an address names and lists what it selects there.
func selected(t *testing.T, token *softhsm.Token, uri string, opts engine.Options) string {
	t.Helper()
	u, err := ParseURI(uri)
	if err != nil {
		return refused
	}
	at := u
	at.Object, at.ID, at.Type, at.empty = "", "", "", u.empty&(1<<tokenAttributes-1)
	if at.ModulePath == "" && at.ModuleName == "" {
		at.ModulePath = token.ModulePath
	}
	if at.PINSource == "" && !at.HasPINValue() {
		at.PINSource = token.PINFile
	}
	e, err := Driver.Open(t.Context(), at, opts)
	switch {
	case errors.Is(err, engine.ErrTokenNotFound), errors.Is(err, engine.ErrModuleNotFound):
		// Nor does the address of an object select anything in a token that was opened by another.
		at = URI{ModulePath: token.ModulePath, PINSource: token.PINFile}
		if e, err = Driver.Open(t.Context(), at, opts); err != nil {
			t.Fatal(err)
		}
	case err != nil:
		t.Fatalf("%s: %v", uri, err)
	}
	objects, err := e.(engine.Lister).List(t.Context(), u)
	if closing := e.Close(); closing != nil {
		t.Fatal(closing)
	}
	if err != nil {
		return nothing
	}
	var classes []string
	for _, object := range objects {
		classes = append(classes, string(object.Class))
	}
	return words(classes)
}

// p11tool lists what an address selects to GnuTLS.
func p11tool(t *testing.T, token *softhsm.Token, uri string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "p11tool", "--batch", "--login", "--provider", token.ModulePath, "--only-urls", "--list-all", uri)
	cmd.Env = append(os.Environ(), append(token.Env(), "GNUTLS_PIN="+token.PIN)...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && strings.Contains(string(out), "Error in provided PIN"):
		return wrongPIN
	case errors.As(err, &exit) && strings.Contains(string(out), "Error in crt_list_import"):
		return refused
	case errors.As(err, &exit) && strings.Contains(string(out), "No matching objects"):
		return nothing
	case err != nil:
		t.Fatalf("%s: %v (make deps installs it): %s", cmd, err, out)
	}
	var classes []string
	for _, match := range regexp.MustCompile(`(?m)^pkcs11:.*type=([a-z-]+)$`).FindAllStringSubmatch(string(out), -1) {
		classes = append(classes, match[1])
	}
	return words(classes)
}

func words(classes []string) string {
	if len(classes) == 0 {
		return nothing
	}
	slices.Sort(classes)
	return strings.Join(classes, " ")
}

// TestModuleNames wants of each module that p11-kit knows that we find the same file.
func TestModuleNames(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "p11-kit", "list-modules").Output()
	if err != nil {
		t.Fatalf("p11-kit (make deps installs it): %v", err)
	}
	modules := regexp.MustCompile(`(?m)^(\S+): (\S+)$`).FindAllStringSubmatch(string(out), -1)
	if len(modules) < 2 {
		t.Fatalf("p11-kit lists %s", out)
	}
	for _, module := range modules {
		name, file := module[1], module[2]
		got, err := systemPlaces().findModule(URI{ModuleName: strings.ToLower(name)})
		if err != nil || got != file && filepath.Base(got) != file {
			t.Errorf("%s: %s, %v, want %s", name, got, err, file)
		}
	}
}

func TestFindModule(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for path, content := range map[string]string{
		"etc/both.module":    "module: /first.so\n",
		"etc/share.module":   "# module: /not.so\ndisable-in: p11-kit-proxy\n",
		"etc/Case.module":    "module: /case.so\n",
		"etc/case.module":    "module: /case.so\n",
		"etc/empty.module":   "module:\n",
		"etc/away.module":    "module: away.so\n",
		"etc/control.module": "module: /a\x01b\n",
		"etc/large.module":   strings.Repeat("#", maxModuleFile+1),
		"usr/both.module":    "module: /second.so\n",
		"usr/share.module":   "module:  relative.so \r\npriority: 1\n",
		"lib/relative.so":    "", "lib/libAlone.so": "", "lib/both.so": "", "lib/twice.so": "", "lib/twice.txt": "",
		"local/libtwice.so": "", "local/alone.so.1": "",
	} {
		path = filepath.Join(dir, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../lib/libAlone.so", filepath.Join(dir, "local", "alone.so")); err != nil {
		t.Fatal(err)
	}
	p := places{
		configurations: []string{filepath.Join(dir, "etc"), filepath.Join(dir, "usr"), filepath.Join(dir, "missing")},
		directories:    []string{filepath.Join(dir, "lib"), filepath.Join(dir, "local"), filepath.Join(dir, "missing")},
	}
	for query, want := range map[string]string{
		"module-name=both":       "/first.so",
		"module-name=Both":       "/first.so",
		"module-name=share":      dir + "/lib/relative.so",
		"module-name=alone":      dir + "/lib/libAlone.so",
		"module-path=/any/thing": "/any/thing",
		"module-path=" + dir + "/local&module-name=TWICE":           dir + "/local/libtwice.so",
		"module-path=" + dir + "/lib/libAlone.so&module-name=alone": dir + "/lib/libAlone.so",

		"module-name=twice":   "means any of",
		"module-name=case":    "means any of",
		"module-name=empty":   "names no module",
		"module-name=away":    "away.so, which is in none of",
		"module-name=control": "not the path of a module",
		"module-name=large":   "bytes",
		"module-name=nothing": "no nothing.so nor libnothing.so in",
		"module-path=" + dir + "/lib/twice.so&module-name=x": "different modules",
		"module-path=" + dir + "/nowhere&module-name=x":      "no such file",
		"": "module-path or module-name is missing",
	} {
		u, err := ParseURI("pkcs11:?" + query)
		if err != nil {
			t.Fatal(err)
		}
		got, err := p.findModule(u)
		if strings.HasPrefix(want, "/") {
			if err != nil || got != want {
				t.Errorf("%s: %s, %v, want %s", query, got, err, want)
			}
		} else if errors.Is(err, engine.ErrModule) == errors.Is(err, engine.ErrModuleNotFound) || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%s: %s, %v, want that of a module: %s", query, got, err, want)
		}
	}
}

// FuzzModuleFile: what is read of p11-kit's configuration is a path or an error.
func FuzzModuleFile(f *testing.F) {
	seeds, err := filepath.Glob("/usr/share/p11-kit/modules/*.module")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds (make deps installs p11-kit-modules): %v", err)
	}
	for _, path := range seeds {
		seed, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := parseModuleFile(data)
		if err == nil && (len(file) > maxPath || strings.ContainsAny(file, "\n\x00") || strings.TrimSpace(file) != file) {
			t.Errorf("%q", file)
		}
	})
}
