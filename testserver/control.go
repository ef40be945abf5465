package testserver

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// The control interface is a Unix socket: one JSON object each way, then the
// connection is closed.
type controlRequest struct {
	Command string `json:"command"` // one of the constants below
	// Faults of controlSetFaults, in their textual form.
	Faults []string `json:"faults,omitempty"`
	// What controlIDevID asks for, as in IDevIDRequest; all DER.
	CSR         []byte `json:"csr,omitempty"`
	PublicKey   []byte `json:"public_key,omitempty"`
	Subject     []byte `json:"subject,omitempty"`
	SAN         []byte `json:"san,omitempty"`
	SANCritical bool   `json:"san_critical,omitempty"`
	// Rollover is what controlRollover asks for.
	Rollover Rollover `json:"rollover,omitzero"`
}

const (
	controlFaults    = "faults"
	controlSetFaults = "set-faults"
	controlIDevID    = "idevid"
	controlRollover  = "rollover"
)

type controlResponse struct {
	Error       string   `json:"error,omitempty"`
	Faults      []string `json:"faults,omitempty"`
	Certificate []byte   `json:"certificate,omitempty"`
	// Rollover is the DER of the four certificates, in their fields' order.
	Rollover [][]byte `json:"rollover,omitempty"`
}

const (
	controlLimit   = 64 << 10 // bytes of a message
	controlTimeout = 10 * time.Second
)

// listenControl makes the socket; a socket that nobody listens on any more is
// what a killed server left, and is replaced.
func listenControl(path string) (net.Listener, error) {
	if path == "" {
		return nil, nil
	}
	listener, err := net.Listen("unix", path)
	if errors.Is(err, syscall.EADDRINUSE) {
		if conn, dialErr := net.Dial("unix", path); dialErr == nil {
			return nil, errors.Join(fmt.Errorf("listen on control socket: %w", err), conn.Close())
		} else if info, statErr := os.Lstat(path); errors.Is(dialErr, syscall.ECONNREFUSED) &&
			statErr == nil && info.Mode().Type() == os.ModeSocket && os.Remove(path) == nil { // a plain file refuses too
			listener, err = net.Listen("unix", path)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("listen on control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on control socket: %w", err), listener.Close())
	}
	return listener, nil
}

func (s *Server) serveControl() {
	for {
		conn, err := s.control.Accept()
		if err != nil {
			return // closed
		}
		s.serving.Go(func() {
			defer conn.Close()
			defer context.AfterFunc(s.stopping, func() { _ = conn.Close() })()
			var req controlRequest
			var resp controlResponse
			err := conn.SetDeadline(time.Now().Add(controlTimeout))
			if err == nil {
				err = json.NewDecoder(io.LimitReader(conn, controlLimit)).Decode(&req)
			}
			if err == nil {
				resp, err = s.command(req)
			}
			if err != nil {
				resp = controlResponse{Error: err.Error()}
			}
			_ = json.NewEncoder(conn).Encode(resp) // the other end has gone: nobody to tell
		})
	}
}

func (s *Server) command(req controlRequest) (controlResponse, error) {
	switch req.Command {
	case controlFaults:
		return controlResponse{Faults: s.Faults().Strings()}, nil
	case controlSetFaults:
		faults, err := ParseFaults(req.Faults)
		if err != nil {
			return controlResponse{}, err
		}
		return controlResponse{Faults: faults.Strings()}, s.SetFaults(faults)
	case controlIDevID:
		idevid := IDevIDRequest{CSR: req.CSR, RawSubject: req.Subject}
		if req.PublicKey != nil {
			pub, err := x509.ParsePKIXPublicKey(req.PublicKey)
			if err != nil {
				return controlResponse{}, fmt.Errorf("idevid: public key: %w", err)
			}
			idevid.PublicKey = pub
		}
		if req.SAN != nil {
			idevid.SAN = &pkix.Extension{Critical: req.SANCritical, Value: req.SAN}
		}
		cert, err := s.IssueIDevID(idevid)
		if err != nil {
			return controlResponse{}, err
		}
		return controlResponse{Certificate: cert.Raw}, nil
	case controlRollover:
		made, err := s.Rollover(req.Rollover)
		return controlResponse{Rollover: made.raw()}, err
	}
	return controlResponse{}, fmt.Errorf("control: no command %q", req.Command)
}

// Control speaks to a running server through its control socket.
type Control struct {
	Path string
}

// Faults returns the textual form of the faults that are on.
func (c Control) Faults() ([]string, error) {
	resp, err := c.do(controlRequest{Command: controlFaults})
	return resp.Faults, err
}

// SetFaults replaces all faults, given in their textual form.
func (c Control) SetFaults(faults []string) ([]string, error) {
	resp, err := c.do(controlRequest{Command: controlSetFaults, Faults: faults})
	return resp.Faults, err
}

// Rollover is [Server.Rollover] of the running server.
func (c Control) Rollover(to Rollover) (RolloverCertificates, error) {
	resp, err := c.do(controlRequest{Command: controlRollover, Rollover: to})
	if err != nil {
		return RolloverCertificates{}, err
	}
	return parseRollover(resp.Rollover)
}

// IssueIDevID is [Server.IssueIDevID] of the running server.
func (c Control) IssueIDevID(req IDevIDRequest) (*x509.Certificate, error) {
	message := controlRequest{Command: controlIDevID, CSR: req.CSR, Subject: req.RawSubject}
	if req.PublicKey != nil {
		der, err := x509.MarshalPKIXPublicKey(req.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("idevid: public key: %w", err)
		}
		message.PublicKey = der
	}
	if req.SAN != nil {
		message.SAN, message.SANCritical = req.SAN.Value, req.SAN.Critical
	}
	resp, err := c.do(message)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(resp.Certificate)
}

func (c Control) do(req controlRequest) (controlResponse, error) {
	resp, err := c.exchange(req)
	if err != nil {
		return controlResponse{}, fmt.Errorf("control socket %s: %w", c.Path, err)
	}
	if resp.Error != "" {
		return controlResponse{}, errors.New(resp.Error)
	}
	return resp, nil
}

func (c Control) exchange(req controlRequest) (resp controlResponse, err error) {
	conn, err := net.Dial("unix", c.Path)
	if err != nil {
		return resp, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(controlTimeout)); err != nil {
		return resp, err
	}
	if err := json.NewEncoder(conn).Encode(req); err != nil {
		return resp, err
	}
	return resp, json.NewDecoder(io.LimitReader(conn, controlLimit)).Decode(&resp)
}
