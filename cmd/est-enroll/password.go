package main

// Where the password of HTTP Basic comes from: a file, or systemd's credential.

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"

	"estenroll/internal/durable"
)

const (
	// passwordCredential is the name of systemd's credential with the password.
	passwordCredential = "est-enroll-http-password"
	passwordLimit      = 4 << 10 // bytes
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
		return "", nil, errors.New("http-password-file: whose it is, http-user says")
	case path == "":
		return "", nil, errors.New("http-user: its password is missing: name a file with http-password-file, or give systemd's credential " + passwordCredential)
	case bytes.ContainsAny([]byte(s.httpUser), ":\x00\r\n"):
		return "", nil, errors.New("http-user: a colon or a control character, which HTTP Basic has no place for") // RFC 7617 §2
	}
	return s.httpUser, func() ([]byte, error) {
		data, err := durable.ReadFile(path, passwordLimit)
		if err != nil {
			return nil, &usageError{fmt.Errorf("http-password-file: %w", err)}
		}
		password := bytes.TrimRight(data, "\r\n")
		if len(password) == 0 {
			return nil, &usageError{errors.New("http-password-file: there is nothing in it")}
		}
		return password, nil
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
