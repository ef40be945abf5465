package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// ErrHook says that a hook failed. The credential itself is not concerned.
var ErrHook = errors.New("the hook failed")

// The hooks of a run.
const (
	HookBefore  = "before"  // it is about to act
	HookAfter   = "after"   // there is a new certificate
	HookFailure = "failure" // an attempt failed
)

// The variables of a hook's environment. None has the name of a setting: a hook may
// call est-enroll itself.
const (
	HookVariable           = "EST_ENROLL_HOOK" // which it is
	NameVariable           = "EST_ENROLL_NAME" // of the credential
	ActionVariable         = "EST_ENROLL_ACTION"
	ReasonVariable         = "EST_ENROLL_REASON"
	OldSerialVariable      = "EST_ENROLL_OLD_SERIAL"
	OldNotAfterVariable    = "EST_ENROLL_OLD_NOT_AFTER"
	NewSerialVariable      = "EST_ENROLL_NEW_SERIAL"
	NewNotAfterVariable    = "EST_ENROLL_NEW_NOT_AFTER"
	KeyURIVariable         = "EST_ENROLL_KEY_URI"
	CertificateURIVariable = "EST_ENROLL_CERTIFICATE_URI"
	NextAttemptVariable    = "EST_ENROLL_NEXT_ATTEMPT"
	ErrorVariable          = "EST_ENROLL_ERROR"
	ExitCodeVariable       = "EST_ENROLL_EXIT_CODE"
)

// HookVariables returns the names of all of them.
func HookVariables() []string {
	return []string{
		HookVariable, NameVariable, ActionVariable, ReasonVariable, OldSerialVariable, OldNotAfterVariable, NewSerialVariable,
		NewNotAfterVariable, KeyURIVariable, CertificateURIVariable, NextAttemptVariable, ErrorVariable, ExitCodeVariable,
	}
}

// Hook is a program of the operator's that a run calls, without a shell and without
// arguments.
type Hook struct {
	Name string // HookBefore, HookAfter or HookFailure
	Path string // absolute
	// Timeout ends it, and what it has started, by SIGTERM, and Grace after that by
	// SIGKILL.
	Timeout, Grace time.Duration
	// Variables of its environment, by name. Each of HookVariables is in it, empty
	// where there is nothing to say.
	Variables map[string]string
	// Line is told what it prints, line by line, up to a limit.
	Line func(string)
}

const (
	maxHookLines  = 100
	maxHookLine   = 512 // bytes
	maxHookValue  = 4096
	hookPath      = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	hookDirectory = "/"
)

// CheckHook refuses what cannot be run as a hook. The warning says who else can
// change what is run as the user of this process.
func CheckHook(path string) (warning string, err error) {
	if !filepath.IsAbs(path) {
		return "", errors.New("want an absolute path")
	}
	status, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !status.Mode().IsRegular() {
		return "", fmt.Errorf("%s is not a file", path)
	}
	const execute = 1 // X_OK
	if err := syscall.Access(path, execute); err != nil {
		return "", fmt.Errorf("%s cannot be executed by this user: %w", path, err)
	}
	if stat, ok := status.Sys().(*syscall.Stat_t); ok && stat.Uid != 0 && int(stat.Uid) != os.Geteuid() {
		return fmt.Sprintf("%s belongs to user %d, who decides what is run", path, stat.Uid), nil
	}
	if status.Mode().Perm()&0o022 != 0 {
		return path + " can be written to by others, who decide what is run: chmod go-w", nil
	}
	return "", nil
}

// Run runs the hook to its end. It stands in a process group of its own: when the
// time is over, or the context ends, all of that is ended. What it leaves in the
// background after its own end is left alone, and not listened to. ErrHook, and the
// context's error.
func (h Hook) Run(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, h.Timeout)
	defer cancel()
	output := &lines{tell: h.Line}
	cmd := exec.CommandContext(limited, h.Path)
	cmd.Dir, cmd.Env = hookDirectory, h.environment(os.Environ())
	cmd.Stdout, cmd.Stderr = output, output // one goroutine writes
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	group := func(signal syscall.Signal) error { return syscall.Kill(-cmd.Process.Pid, signal) }
	cmd.Cancel = func() error { return group(syscall.SIGTERM) }
	cmd.WaitDelay = h.Grace
	err := cmd.Run()
	output.flush()
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay) && limited.Err() == nil:
		return nil
	case limited.Err() != nil && cmd.Process != nil:
		_ = group(syscall.SIGKILL) // there may be none left
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case limited.Err() != nil:
		err = fmt.Errorf("it did not end within %s", h.Timeout)
	}
	return fmt.Errorf("run hook-%s %s: %w: %w", h.Name, h.Path, err, ErrHook)
}

// environment is what a hook gets: of ours only what says where things are, the token
// among them, and how a person writes, so that no PIN, no directory of credentials and no setting is in it.
func (h Hook) environment(ours []string) []string {
	kept := map[string]string{"PATH": hookPath}
	for _, pair := range ours {
		name, value, _ := strings.Cut(pair, "=")
		switch name {
		case "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TZ", "LANG", "LANGUAGE":
			kept[name] = value
		case "SOFTHSM2_CONF", "TPM2_PKCS11_STORE", "TPM2_PKCS11_TCTI": // a hook uses the token too
			kept[name] = value
		default:
			if strings.HasPrefix(name, "LC_") {
				kept[name] = value
			}
		}
	}
	for _, name := range HookVariables() {
		kept[name] = ""
	}
	for name, value := range h.Variables {
		// No value ends early, or is more than exec takes.
		value = strings.ReplaceAll(value, "\x00", "")
		kept[name] = value[:min(len(value), maxHookValue)]
	}
	kept[HookVariable] = h.Name
	var pairs []string
	for _, name := range slices.Sorted(maps.Keys(kept)) {
		pairs = append(pairs, name+"="+kept[name])
	}
	return pairs
}

// lines makes lines of what is written to it, and listens to the end whatever the
// length: a program that is not listened to would wait, or be killed by its writing.
type lines struct {
	tell func(string)
	line []byte // begun
	told int
}

func (l *lines) Write(data []byte) (int, error) {
	rest := data
	for len(rest) > 0 && l.told <= maxHookLines {
		line, after, whole := bytes.Cut(rest, []byte("\n"))
		room := maxHookLine + 1 - len(l.line) // one more than is shown
		l.line = append(l.line, line[:min(len(line), room)]...)
		if whole {
			l.end()
		}
		rest = after
	}
	return len(data), nil
}

func (l *lines) flush() {
	if len(l.line) > 0 {
		l.end()
	}
}

func (l *lines) end() {
	text := string(l.line)
	if len(text) > maxHookLine {
		text = text[:maxHookLine] + "…"
	}
	switch l.told++; {
	case l.tell == nil:
	case l.told <= maxHookLines:
		l.tell(text)
	case l.told == maxHookLines+1:
		l.tell(fmt.Sprintf("more than %d lines: the rest is not shown", maxHookLines))
	}
	l.line = l.line[:0]
}
