package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
)

var (
	// spiedKey is a private key of a token as pkcs11-spy writes down that it is created.
	spiedKey = regexp.MustCompile(`C_CreateObject\n(?:.+\n){3}    CKA_CLASS +CKO_PRIVATE_KEY *\n((?:.+\n)*)`)
	// spiedValue is its CKA_VALUE, the number of an EC key.
	spiedValue = regexp.MustCompile(`(?m)^    CKA_VALUE .*\n((?:    [0-9A-F]{8}  .*\n)+)`)
	spiedBytes = regexp.MustCompile(`(?m)^    [0-9A-F]{8}  ((?:[0-9A-F]{2} )+)`)
)

// checkImported N wants so many EC keys to have been imported, by the log of pkcs11-spy,
// and none of them in any other file of the script: in what the programs have printed,
// the state, the record of the server.
func (s *session) checkImported(_ *testscript.TestScript, args []string) error {
	log, err := os.ReadFile(filepath.Join(s.work, "spy.log"))
	if err != nil {
		return err
	}
	imported := 0
	for _, made := range spiedKey.FindAllSubmatch(log, -1) {
		value := spiedValue.FindSubmatch(made[1])
		if value == nil {
			return fmt.Errorf("a key without a value in %s", made[1])
		}
		var digits string
		for _, line := range spiedBytes.FindAllSubmatch(value[1], -1) {
			digits += strings.ReplaceAll(string(line[1]), " ", "")
		}
		key, err := hex.DecodeString(digits)
		if err != nil || len(key) < 24 {
			return fmt.Errorf("no key: %q: %w", digits, err)
		}
		if bytes.Contains(made[1], []byte("CKA_TOKEN             True")) {
			imported++
		}
		if found, err := s.holding(key); err != nil || len(found) > 0 {
			return errors.Join(err, fmt.Errorf("the private key is in %q", found))
		}
	}
	if len(args) != 1 || args[0] != strconv.Itoa(imported) {
		return fmt.Errorf("%d keys were imported, want %s", imported, args)
	}
	return nil
}

// holding returns the files but for the spy's log that have a secret: as it is, in
// hexadecimal, or in base64 at any place of a text.
func (s *session) holding(secret []byte) (found []string, err error) {
	forms := [][]byte{secret, hex.AppendEncode(nil, secret), bytes.ToUpper(hex.AppendEncode(nil, secret))}
	for shift := range 3 {
		part := secret[shift:]
		forms = append(forms, base64.StdEncoding.AppendEncode(nil, part[:len(part)/3*3]))
	}
	err = filepath.WalkDir(s.work, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || entry.Name() == "spy.log" {
			return err
		}
		data, err := os.ReadFile(path)
		for _, form := range forms {
			if bytes.Contains(data, form) {
				found = append(found, path)
			}
		}
		return err
	})
	return found, err
}
