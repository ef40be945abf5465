package main

// Where the password of HTTP Basic and the pre-shared key of a bootstrap server come
// from: a file, or systemd's credential.

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"estenroll/est"
	"estenroll/internal/durable"
)

const (
	// passwordCredential is the name of systemd's credential with the password.
	passwordCredential = "est-enroll-http-password"
	passwordLimit      = 4 << 10 // bytes

	// pskCredential is the name of systemd's credential with the pre-shared key.
	pskCredential = "est-enroll-psk"
	// A shorter key than 128 bits can be guessed by whoever has seen one handshake (RFC
	// 4279 §7.2); each implementation must support 64 bytes (§5.3).
	minPSK, maxPSK = 16, 64
	maxPSKIdentity = 128 // bytes, RFC 4279 §5.3
)

// httpPassword returns the user and what reads the password, when a server asks for
// it: not before, so that a server that does not costs no file.
func (s *settings) httpPassword(lookupEnv func(string) (string, bool)) (user string, password func() ([]byte, error), err error) {
	path := s.httpPasswordFile
	if path == "" {
		path = credentialFile(lookupEnv, passwordCredential)
	}
	switch {
	case s.httpUser == "" && s.httpPasswordFile == "":
		return "", nil, nil
	case s.httpUser == "":
		return "", nil, errors.New("http-password-file: whose password it is, http-user has to say")
	case path == "":
		return "", nil, errors.New("http-user: its password is missing: name a file with http-password-file, or give systemd's credential " + passwordCredential)
	case bytes.ContainsAny([]byte(s.httpUser), ":\x00\r\n"):
		return "", nil, errors.New("http-user: a colon or a control character, which HTTP Basic has no place for") // RFC 7617 §2
	}
	return s.httpUser, func() ([]byte, error) {
		return secretLine("http-password-file", path)
	}, nil
}

// checkPassword reads the password of HTTP Basic as a run would: a server asks for it when
// it has the CSR, which is too late to find out that it cannot be read.
func (s *settings) checkPassword(lookupEnv func(string) (string, bool)) error {
	for _, one := range s.treated() {
		if !strings.HasPrefix(one.server, est.SchemeHTTPS+":") {
			continue
		}
		_, read, err := one.httpPassword(lookupEnv)
		if err == nil && read != nil {
			var password []byte
			password, err = read()
			clear(password)
		}
		if err != nil {
			return &usageError{s.of(one, err)}
		}
	}
	return nil
}

// secretLine reads what a secret's file has in its one line.
func secretLine(setting, path string) ([]byte, error) {
	data, err := durable.ReadFile(path, passwordLimit)
	if err != nil {
		return nil, &usageError{fmt.Errorf("%s: %w", setting, err)}
	}
	secret := bytes.TrimRight(data, "\r\n")
	if len(secret) == 0 {
		return nil, &usageError{fmt.Errorf("%s: %s: there is nothing in it", setting, path)}
	}
	return secret, nil
}

// psk returns what reads the pre-shared key, when a session by it is opened; nil where
// there is none. The caller clears the key.
func (s *settings) psk(lookupEnv func(string) (string, bool)) (key func() ([]byte, error), err error) {
	path := s.pskKeyFile
	if path == "" {
		path = credentialFile(lookupEnv, pskCredential)
	}
	switch {
	case s.pskIdentity == "" && s.pskKeyFile == "":
		return nil, nil
	case s.pskIdentity == "":
		return nil, errors.New("psk-key-file: whose key it is, psk-identity has to say")
	case len(s.pskIdentity) > maxPSKIdentity || !utf8.ValidString(s.pskIdentity):
		return nil, fmt.Errorf("psk-identity: want at most %d bytes of UTF-8", maxPSKIdentity)
	case path == "":
		return nil, errors.New("psk-identity: its key is missing: name a file with psk-key-file, or give systemd's credential " + pskCredential)
	}
	return func() ([]byte, error) {
		line, err := secretLine("psk-key-file", path)
		if err != nil {
			return nil, err
		}
		defer clear(line)
		key := make([]byte, hex.DecodedLen(len(line)))
		// The decoder's error has the digit that is none.
		if _, err := hex.Decode(key, line); err != nil || len(key) < minPSK || len(key) > maxPSK {
			return nil, &usageError{fmt.Errorf("psk-key-file: %s: want a key of %d to %d bytes in hexadecimal, in one line", path, minPSK, maxPSK)}
		}
		return key, nil
	}, nil
}

// credentialFile returns the path of one of systemd's credentials, if this process
// has credentials.
func credentialFile(lookupEnv func(string) (string, bool), name string) string {
	directory, _ := lookupEnv("CREDENTIALS_DIRECTORY")
	if !filepath.IsAbs(directory) {
		return ""
	}
	return filepath.Join(directory, name)
}
