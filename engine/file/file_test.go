package file_test

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"estenroll/engine"
	"estenroll/engine/enginetest"
	"estenroll/engine/file"
)

// none are the rules of the suite that say nothing of files, by what they lack.
var none = map[string][]string{
	"a file can be read": {
		"a generated key is private, sensitive, not extractable and for signing only", "an imported key is private, sensitive, not extractable and for signing only", "it is what was asked for, for signing only",
		"a key that is not what was asked for is destroyed and reported", "a key recovered after a crash is what was asked for",
	},
	"there is no module that fails": {
		"what a failed generation leaves is removed", "what a failed import leaves is removed", "a key that is refused as it is comes in wrapped", "what a module cannot do is ErrUnsupported with the module's name",
		"another one than was asked for is destroyed", "what the module cannot do is ErrUnsupported",
		"a half-written object is replaced, created before it is destroyed, never rewritten", // it is replaced in one step
	},
	"a pair is one file, and so is a label with an id": {
		"a pair found after a crash is kept only whole", "RemoveKey destroys both halves and nothing else",
		"more than one match is an error, never a guess", "the removal of a leaf is no guess among different ones",
		"a chain certificate of another program is shared by value and left alone",
	},
	"of a file nobody knows what its key is for, and no secret key is in one": {
		"a key for signing decrypts nothing", "a secret key unwraps into the token, where it stays",
	},
	"it parses other keys, and refuses them": {"a key of a kind that the driver does not have disturbs nothing"},
	"there is no PIN": {
		"a PIN that failed is never tried again", "a PIN refused in an earlier run is not tried until its source changes",
		"a refused PIN is remembered by its source, not by itself", "never when the token says it is the final try",
		"never when the token says that the PIN is locked", "a PIN file's trailing newline is not the PIN",
		"an open token tells what it is and where its PIN came from", "an empty PIN never reaches the module", "a PIN file is small, regular and one line", "a PIN cannot be printed",
	},
	"there is no device": {
		"generation is never repeated after a device error", "creation is never repeated after a device error",
		"destruction is never repeated after a device error", "reading and signing are repeated once after a device error",
		"an accepted PIN opens the same token once more after a device loss", "one module handle, one session and one login for all engines of a token",
		"on device death the module is finalised whatever the count and every token reopens", "nothing is called after the module is finalised",
		"a token is locked for writing between processes", // its lock is elsewhere: TestLock
		"a write-protected token is ErrTokenReadOnly", "a session is closed and a login made for each that was opened",
		"a token that is not there, or twice there, is said so",
	},
}

// TestEngine has the driver pass the suite. Its addresses are translated: the suite
// writes them as RFC 7512 does.
func TestEngine(t *testing.T) {
	without := map[string]string{}
	for reason, names := range none {
		for _, name := range names {
			without[name] = reason
		}
	}
	enginetest.Run(t, enginetest.Harness{New: newToken, Without: without})
}

func newToken(t *testing.T) enginetest.Token {
	dir := t.TempDir()
	write := func(name string, block *pem.Block) error {
		return os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600)
	}
	return enginetest.Token{
		Driver: engine.Driver{Parse: translated, Open: file.Driver.Open}, Address: "file:" + dir,
		Calls: func(*testing.T) []string { return nil },
		Damage: func(t *testing.T, label string) {
			found, err := filepath.Glob(filepath.Join(dir, label+"~*"))
			if err != nil || len(found) != 1 {
				t.Fatalf("%q: %v, %v", label, found, err)
			}
			if err := os.Truncate(found[0], 40); err != nil {
				t.Fatal(err)
			}
		},
		Algorithms: engine.Algorithms(),
		GenerateEC: func(label, id string) ([]byte, error) {
			path := filepath.Join(dir, label+"~"+id+".key")
			if out, err := exec.Command("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-out", path).CombinedOutput(); err != nil {
				return nil, errors.New(string(out))
			}
			return exec.Command("openssl", "pkey", "-in", path, "-pubout", "-outform", "DER").Output()
		},
		GenerateDecryption: func(label, id string, _ bool) error {
			_, err := exec.Command("openssl", "genrsa", "-out", filepath.Join(dir, label+"~"+id+".key"), "2048").Output()
			return err
		},
		WriteCertificate: func(der []byte, label, id string) error {
			return write(label+"~"+id+".crt", &pem.Block{Type: "CERTIFICATE", Bytes: der})
		},
	}
}

// translated parses an address of RFC 7512 as one of this driver.
func translated(text string) (engine.Address, error) {
	rest, is := strings.CutPrefix(text, "pkcs11:")
	if !is {
		return file.Driver.Parse(text)
	}
	var parts []string
	for part := range strings.SplitSeq(rest, ";") {
		name, value, _ := strings.Cut(part, "=")
		switch name {
		case "id":
			value = strings.ToLower(strings.ReplaceAll(value, "%", ""))
		case "token":
			value = "other"
			name = "object" // which no object has
		}
		parts = append(parts, name+"="+value)
	}
	at, err := file.Driver.Parse("file:" + strings.Join(parts, ";"))
	if err != nil { // a token and a label: no such object
		return file.Driver.Parse("file:object=no such object")
	}
	return at, nil
}

func TestParseAddress(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"file:/var/lib/keys", "file:object=device", "file:id=0a0b", "file:object=a b;id=00;type=private", "file:type=cert"} {
		if at, err := file.ParseAddress(text); err != nil || at.String() != text {
			t.Errorf("%s: got %v, %v", text, at, err)
		}
	}
	for _, text := range []string{
		"", "file:", "file", "file:relative", "file:/a/../b", "file:/a/", "file:/a\n", "pkcs11:object=a", "file:object=", "file:object=a;object=b", "file:object=a/b",
		"file:object=a~0b", "file:object=../a", "file:object=.a", "file:id=0", "file:id=0A", "file:id=xx", "file:type=data", "file:label=a", "file:object=a;", "file:id=" + strings.Repeat("00", 33),
		"file:object=" + strings.Repeat("a", 101),
	} {
		if at, err := file.ParseAddress(text); err == nil || !strings.HasPrefix(err.Error(), "file address: ") {
			t.Errorf("%q: got %v, %v", text, at, err)
		}
	}
}

// FuzzParseAddress: what is parsed prints as what parses to the same.
func FuzzParseAddress(f *testing.F) {
	for _, seed := range []string{"file:/var/lib/keys", "file:object=device;id=0a0b;type=private", "file:object=a;object=b"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		at, err := file.ParseAddress(text)
		if err != nil {
			return
		}
		if again, err := file.ParseAddress(at.String()); err != nil || again != at {
			t.Errorf("%q prints as %q, which parses to %+v, %v", text, at, again, err)
		}
	})
}

// A person's files, as OpenSSL writes them and without an id, are a pair; a key is
// nobody else's to read, and OpenSSL reads what is generated here.
func TestFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	openssl := func(args ...string) []byte {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "openssl", args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("openssl %q: %v\n%s", args, err, out)
		}
		return out
	}
	openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "idevid.key", "-out", "idevid.crt", "-subj", "/CN=dev", "-days", "1")
	openssl("genpkey", "-algorithm", "ed25519", "-out", "other.key")
	if err := os.WriteFile(filepath.Join(dir, "README~x.key"), []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	opened, err := file.Driver.Open(t.Context(), at(t, "file:"+dir), engine.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	e := opened.(*file.Engine)
	signer, err := e.Signer(t.Context(), at(t, "file:object=idevid;type=private"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := e.Certificate(t.Context(), at(t, "file:object=idevid"))
	if err != nil {
		t.Fatal(err)
	}
	if key, ok := cert.PublicKey.(*rsa.PublicKey); !ok || !key.Equal(signer.Public()) {
		t.Error("they are no pair")
	}
	if _, err := e.Signer(t.Context(), at(t, "file:object=other")); !errors.Is(err, engine.ErrUnsupported) {
		t.Errorf("Ed25519: got %v", err)
	}
	if objects, err := e.List(t.Context(), nil); err != nil || len(objects) != 5 {
		t.Errorf("got %v, %v", objects, err)
	}
	made, err := e.NewKeyAddress("device")
	if err != nil {
		t.Fatal(err)
	}
	public, err := e.GenerateKey(t.Context(), made, engine.KeySpec{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.DecryptionKey(t.Context(), made); !errors.Is(err, engine.ErrUnsupported) {
		t.Errorf("an EC key for decryption: got %v", err)
	}
	attributes, err := e.KeyAttributes(t.Context(), made)
	if err != nil || *attributes.Sensitive || !*attributes.Extractable {
		t.Errorf("got %+v, %v: a file is neither sensitive nor unreadable", attributes, err)
	}
	path := filepath.Join(dir, "device~"+made.(file.Address).ID+".key")
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%s: %v, %v", path, info, err)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	if got := openssl("pkey", "-in", path, "-pubout", "-outform", "DER"); sha256.Sum256(got) != sha256.Sum256(der) {
		t.Errorf("OpenSSL reads another key: %s", hex.EncodeToString(got))
	}
}

func at(t *testing.T, text string) engine.Address {
	t.Helper()
	a, err := file.ParseAddress(text)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// A kill on the way to a key's file leaves the key under another name: it goes when the
// next run looks for the key, or removes it.
func TestKilledOnTheWay(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	opened, err := file.Driver.Open(t.Context(), at(t, "file:"+dir), engine.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	e := opened.(*file.Engine)
	made, err := e.NewKeyAddress("device")
	if err != nil {
		t.Fatal(err)
	}
	// As TestRemoveTemporaryOfRenameio has it.
	left := filepath.Join(dir, fmt.Sprintf(".device~%s.key42", made.(file.Address).ID))
	for name, look := range map[string]func() error{
		"recover": func() error { _, err := e.RecoverKey(t.Context(), made); return err },
		"remove":  func() error { return e.RemoveKey(t.Context(), made) },
	} {
		if err := os.WriteFile(left, []byte("a key"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := look(); !errors.Is(err, engine.ErrNotFound) {
			t.Errorf("%s: %v, want ErrNotFound", name, err)
		}
		if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %s is there: %v", name, left, err)
		}
	}
}

// Another process that writes is waited for; what is read needs no lock.
func TestLock(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	open := func() *file.Engine {
		t.Helper()
		e, err := file.Driver.Open(t.Context(), at(t, "file:"+dir), engine.Options{LockTimeout: 1})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = e.Close() })
		return e.(*file.Engine)
	}
	e := open()
	made, err := e.NewKeyAddress("device")
	if err != nil {
		t.Fatal(err)
	}
	held := exec.CommandContext(t.Context(), "flock", filepath.Join(dir, "lock"), "-c", "echo held; read end")
	stdin, err := held.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := held.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "lock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := held.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	if _, err := e.GenerateKey(t.Context(), made, engine.KeySpec{}); !errors.Is(err, engine.ErrLocked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
	if _, err := e.List(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if err := errors.Join(stdin.Close(), ignoreExit(held.Wait())); err != nil {
		t.Fatal(err)
	}
	longer, err := file.Driver.Open(t.Context(), at(t, "file:"+dir), engine.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer longer.Close()
	if _, err := longer.GenerateKey(t.Context(), made, engine.KeySpec{}); err != nil {
		t.Error(err)
	}
}

func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

func TestOpen(t *testing.T) {
	t.Parallel()
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		at   engine.Address
		want error
	}{
		"not there":     {t.Context(), at(t, "file:/nonexistent"), engine.ErrTokenNotFound},
		"no directory":  {t.Context(), at(t, "file:/etc/passwd"), engine.ErrTokenNotFound},
		"an object":     {t.Context(), at(t, "file:object=a"), nil},
		"an ended time": {cancelled, at(t, "file:"+t.TempDir()), context.Canceled},
	} {
		_, err := file.Driver.Open(c.ctx, c.at, engine.Options{})
		var form *engine.Error
		if !errors.As(err, &form) || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

// A key's text is in no error, whatever is wrong with it.
func TestUnreadableKeys(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for label, data := range map[string][]byte{
		"empty": nil, "text": []byte("SECRET"), "encrypted": pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("SECRET")}),
		"torn": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("SECRET")}), "large": make([]byte, 1<<20),
	} {
		if err := os.WriteFile(filepath.Join(dir, label+".key"), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	e, err := file.Driver.Open(t.Context(), at(t, "file:"+dir), engine.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for _, label := range []string{"empty", "text", "encrypted", "torn", "large"} {
		if _, err := e.Signer(t.Context(), at(t, "file:object="+label)); err == nil || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: got %v", label, err)
		}
	}
}
