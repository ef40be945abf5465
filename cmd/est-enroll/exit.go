package main

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"syscall"

	"estenroll"
	"estenroll/csr"
	"estenroll/engine"
	"estenroll/est"
	"estenroll/internal/agent"
	"estenroll/internal/durable"
	"estenroll/lwm2m"
)

// Exit codes are part of the interface: the README and --help list them.
const (
	exitDone        = 0
	exitTryLater    = 1
	exitUsage       = 2
	exitPending     = 3
	exitToken       = 4
	exitRefused     = 5
	exitRenewed     = 10 // on request
	exitInterrupted = 130
)

const exitCodeHelp = `Exit codes:
  0    done, or nothing to do
  1    failed, try again later: no answer, another run at work, not proven yet, a hook
  2    usage or configuration: change it first
  3    pending: the server has not decided, run again at the time that is said
  4    token, module or PIN: do not retry, a person must look
  5    the server refused, or its answer is refused: do not retry
  10   renewed or enrolled again, with --detailed-exit-code alone, which tells it from 0
  130  interrupted; the next run goes on

With several credentials the code is the worst of theirs, in this order:
4, 130, 5, 2, 1, 3, 10, 0.`

type judgement struct {
	code int
	hint string
}

// judge is the one place that turns an error into an exit code and advice.
func judge(err error, interrupted bool) judgement {
	if interrupted || errors.Is(err, context.Canceled) {
		return judgement{exitInterrupted, "nothing is lost: run the same command again and it goes on"}
	}
	var told *toldError
	if errors.As(err, &told) {
		return judgement{told.code, ""}
	}
	var pending *estenroll.PendingError
	if errors.As(err, &pending) {
		return judgement{exitPending, "run the same command again then; the key and the request are kept, until est-enroll cancel"}
	}
	if hint := pinHint(err); hint != "" {
		return judgement{exitToken, hint}
	}
	var ambiguous *engine.AmbiguousError
	if errors.As(err, &ambiguous) {
		return judgement{exitToken, "say which one is meant: " + alternatives(ambiguous)}
	}
	for _, known := range judgements {
		if errors.Is(err, known.is) {
			return known.judgement
		}
	}
	var status *est.StatusError
	var response *est.ResponseError
	var engineErr *engine.Error
	var security lwm2m.ValidationError
	switch {
	case errors.As(err, &security):
		return judgement{exitUsage, "check security-instance, security-server, security-server-certificate and short-server-id"}
	case isUsage(err) && isOfFile(err):
		return judgement{exitUsage, "check the name of that file, and that this user can read it"}
	case isUsage(err):
		return judgement{exitUsage, "est-enroll --help shows every setting"}
	case errors.As(err, &engineErr) && isOfFile(err):
		return judgement{exitToken, "check that pin-source names a file that this user can read, and lock-dir a directory that it can write to"}
	case errors.As(err, &engineErr):
		return judgement{exitToken, "look at the token: pkcs11-tool --module MODULE --list-token-slots"}
	case errors.As(err, &status) && status.NotFound && status.Operation == est.CACerts && strings.HasPrefix(status.Server, est.SchemeHTTPS+":"):
		return judgement{exitRefused, "EST is not at that path: check label and the path in server"}
	case errors.As(err, &status) && status.NotFound && status.Operation == est.CACerts:
		return judgement{exitRefused, "EST is not at that path: check label and the path in server; --discovery on asks the server where it is"}
	case errors.As(err, &status) && status.NotFound && status.Operation == est.ServerKeyGen:
		return judgement{exitRefused, "this server makes no keys: leave server-keygen out, and the token generates them"}
	case errors.As(err, &response) && response.Operation == est.CSRAttrs:
		return judgement{exitRefused, "ask the people of the server about its CSR attributes; --csr-attributes off asks for what is configured"}
	case errors.As(err, &status) && status.Temporary():
		return judgement{exitTryLater, "the server has a problem of its own, which its log knows: the key and the request are kept for the next run"}
	case errors.As(err, &status), errors.As(err, &response):
		return judgement{exitRefused, "ask the people of the EST server; the record of the attempt is in est-enroll status"}
	case errors.Is(err, agent.ErrExport):
		return judgement{exitTryLater, "the token and the state are right: make export-dir a directory that this user can write to, with room, and move away what else has the credential's name there; the next run puts the files right"}
	}
	for _, known := range fileJudgements {
		if errors.Is(err, known.is) {
			return known.judgement
		}
	}
	return judgement{exitTryLater, "run it again with -v; if it fails alike, it is a defect of this program or of the machine"}
}

// isOfFile reports an error of a file that the settings name, such as the PIN's, or
// of the token's lock file.
func isOfFile(err error) bool {
	return slices.ContainsFunc([]error{
		fs.ErrNotExist, fs.ErrPermission, fs.ErrExist, syscall.ENOTDIR, syscall.EROFS, durable.ErrNotRegular, durable.ErrNotLockFile,
	}, func(is error) bool { return errors.Is(err, is) })
}

// pinHint says what to do about a PIN that no file of the person's own holds.
func pinHint(err error) string {
	var pin *engine.PINError
	if !errors.As(err, &pin) || !errors.Is(err, engine.ErrPINIncorrect) && !errors.Is(err, engine.ErrPINNotRetried) {
		return ""
	}
	switch pin.Source.Path {
	case "":
		return "run it again and type the right PIN: each wrong one costs a try"
	case credentialSource:
		return "correct the credential, then run once with --retry-pin: systemd's copy of a PIN that is as long does not show that it is another"
	}
	return ""
}

// alternatives lists addresses that tell the matches apart, to be pasted into a
// shell or a configuration file: an address has no quote that is not encoded.
func alternatives(ambiguous *engine.AmbiguousError) string {
	const most = 8
	var addresses []string
	for _, match := range ambiguous.Matches {
		if match.Address != nil {
			addresses = append(addresses, "'"+match.Address.String()+"'")
		}
	}
	if len(addresses) > most {
		addresses = append(addresses[:most], "…")
	}
	return strings.Join(addresses, " or ")
}

// fileJudgements are for errors of files that are nothing more particular.
var fileJudgements = []struct {
	is error
	judgement
}{
	{fs.ErrPermission, judgement{exitUsage, "run as the user that owns the state directory, or give the directory to this one"}},
	{syscall.ENOSPC, judgement{exitTryLater, "make room on the disk; what was begun is gone on with then"}},
	{syscall.EROFS, judgement{exitUsage, "the file system is mounted read-only: state-dir must be writable"}},
	{syscall.ENOTDIR, judgement{exitUsage, "state-dir must be a directory"}},
	{fs.ErrExist, judgement{exitUsage, "state-dir must be a directory"}},
	{durable.ErrNotRegular, judgement{exitUsage, "something else stands where a file of the state directory belongs: move it away"}},
	{durable.ErrNotLockFile, judgement{exitUsage, "something else stands where a lock file belongs: move it away"}},
}

// judgements are looked through in order: an error may be several things.
var judgements = []struct {
	is error
	judgement
}{
	{agent.ErrHook, judgement{exitTryLater, "the certificate is right: correct the program, or hook-timeout; hook-after is called again by the next run"}},
	{estenroll.ErrUnproven, judgement{exitTryLater, "run the same command again later: the stored certificate is proven then, without a new request"}},
	{estenroll.ErrRekeyGivenUp, judgement{exitTryLater, "renew without --rekey keeps the current key; with it, the rekey begins anew"}},
	{estenroll.ErrRefused, judgement{exitRefused, "the device goes on with the certificate it had; ask the people of the server why"}},
	{estenroll.ErrBusy, judgement{exitTryLater, "wait for the other run, or give it longer with --lock-timeout"}},
	{estenroll.ErrExpired, judgement{exitUsage, "run est-enroll enroll: it enrols again, as at the first boot"}},
	{estenroll.ErrOwner, judgement{exitUsage, "run as that user, or name another directory with --state-dir"}},
	{estenroll.ErrKeyNamed, judgement{exitUsage, "leave key out, and rekey generates one and leaves this one alone; without --rekey and rekey-every its certificate is renewed"}},
	{estenroll.ErrKeyOrigin, judgement{exitUsage, "leave key out, or server-keygen: a key is in the HSM already, or the server makes it; decrypt-key goes with server-keygen alone"}},
	{estenroll.ErrConfig, judgement{exitUsage, "give each credential a name and a security-instance of its own; one that is renamed begins anew, in another instance; two with one key want subjects of their own"}},
	{errDeclined, judgement{exitInterrupted, ""}},
	{estenroll.ErrReset, judgement{exitUsage, "run est-enroll reset: it completes what was begun"}},
	{estenroll.ErrWrongToken, judgement{exitToken, "connect the token that holds it; if it was cleared on purpose, the state directory is all that is left: remove it"}},
	{estenroll.ErrNotConfigured, judgement{exitUsage, "name it below credentials again, or destroy what is left of it: est-enroll reset --credential NAME"}},
	{estenroll.ErrNotEnrolled, judgement{exitUsage, "run est-enroll enroll first"}},
	{estenroll.ErrGivenUp, judgement{exitRefused, "run the same command to begin anew, when the people of the server are ready to decide"}},
	{estenroll.ErrClock, judgement{exitTryLater, "set the clock, or leave out --require-clock"}},
	{estenroll.ErrState, judgement{exitUsage, "something else has changed that file: restore it, or move that one file away, and the device goes on with what the others say"}},
	{engine.ErrPINNotRetried, judgement{exitToken, "write the right PIN to its source, or insist with --retry-pin: each try of a wrong PIN may be the last"}},
	{engine.ErrPINIncorrect, judgement{exitToken, "correct the PIN at its source; it is not tried again until the source changes or with --retry-pin"}},
	{engine.ErrPINLocked, judgement{exitToken, "the security officer must unlock the token: pkcs11-tool --init-pin --login --login-type so; a TPM that has locked all PINs: tpm2_dictionarylockout --clear-lockout"}},
	{engine.ErrPINFinalTry, judgement{exitToken, "log in once by hand with the right PIN: pkcs11-tool --login --list-objects"}},
	{engine.ErrPINMissing, judgement{exitToken, "write the PIN to a file and name it in the engine's address: …?pin-source=file:/path; or give systemd's credential " + pinCredential + ", or type the PIN on a terminal"}},
	{engine.ErrBuild, judgement{exitToken, "build it again with CGO_ENABLED=1 and a C compiler: make build"}},
	{engine.ErrDeviceLost, judgement{exitTryLater, "connect the device again and run the same command: it goes on"}},
	{engine.ErrModuleNotFound, judgement{exitToken, "install the HSM's PKCS#11 module and name its file as module-path in the engine's address, or p11-kit's name of it as module-name: p11-kit list-modules"}},
	{engine.ErrModule, judgement{exitToken, "name another file as module-path in the engine's address: this one is no PKCS#11 module for this machine, or lacks something"}},
	{engine.ErrTokenReadOnly, judgement{exitToken, "take off the write protection of the token or of its reader, or name another token in the engine's address"}},
	{engine.ErrTokenFull, judgement{exitToken, "make room in the token: pkcs11-tool --login --delete-object …, then run the same command again"}},
	{engine.ErrTokenNotFound, judgement{exitToken, "list the tokens: pkcs11-tool --module MODULE --list-token-slots; a token whose files a power cut has emptied is gone, and with it its keys"}},
	{engine.ErrLocked, judgement{exitTryLater, "wait for the other program, or give it longer with --lock-timeout"}},
	{estenroll.ErrKeyWanted, judgement{exitRefused, "ask the people of the server for a kind of key that this device has, or insist on key-type with --csr-attributes off"}},
	{csr.ErrNoValue, judgement{exitRefused, "set subject and san, with what the server leaves to the device; --csr-attributes off asks for what is configured"}},
	{csr.ErrSignature, judgement{exitRefused, "ask the people of the server for a signature that this token makes: pkcs11-tool --module MODULE --list-mechanisms; --csr-attributes off signs as it is configured"}},
	{estenroll.ErrNoPoP, judgement{exitRefused, "this transport cannot link a CSR to its session: --pop off, if the server does without"}},
	{estenroll.ErrKeyPolicy, judgement{exitToken, "leave key out, and a key that is not extractable is generated; or insist on this one with --allow-extractable"}},
	{estenroll.ErrKey, judgement{exitToken, "check key against: pkcs11-tool --module MODULE --login --list-objects"}},
	{estenroll.ErrNoImport, judgement{exitToken, "leave server-keygen out, and the token generates the key; or see whether another key-type is one that it takes in"}},
	{estenroll.ErrDecryptKey, judgement{exitToken, "check decrypt-key against: pkcs11-tool --module MODULE --login --list-objects; it is an RSA key for decryption alone, or, with type=secret-key, an AES key that unwraps, and has an id"}},
	{engine.ErrUnsupported, judgement{exitToken, "another key-type or rsa-padding may be what this token has: pkcs11-tool --module MODULE --list-mechanisms"}},
	{estenroll.ErrIDevID, judgement{exitToken, "check idevid-key and idevid-certificate against: pkcs11-tool --module MODULE --login --list-objects"}},
	{estenroll.ErrOtherNames, judgement{exitRefused, "nothing is stored: correct subject and san to what this CA issues, ask its people, or take it with --subject-mismatch warn"}},
	{estenroll.ErrOtherKey, judgement{exitRefused, "nothing is stored: set key-type to what this server makes, ask its people, or take it with --subject-mismatch warn"}},
	{est.ErrKeyEnveloped, judgement{exitRefused, "nothing is stored: name the key that opens it with --decrypt-key, ask the people of the server for one that is not encrypted, or leave server-keygen out"}},
	{est.ErrKeyNotEnveloped, judgement{exitRefused, "nothing is stored: ask the people of the server to encrypt the key; without decrypt-key it is taken as it comes"}},
	{est.ErrKeyNotOpened, judgement{exitRefused, "nothing is stored: compare decrypt-key and its id with the key that the people of the server encrypt for"}},
	{est.ErrKeyMismatch, judgement{exitRefused, "the server issued for another key, nothing is stored: ask the people of the server"}},
	{est.ErrNotVouched, judgement{exitRefused, "check trust-anchors; where the CA has changed its root, compare the SHA-256 with what its people say, and name it with --anchor-fingerprint"}},
	{est.ErrNotTrusted, judgement{exitRefused, "check trust-anchors and the name in server against the server's certificate; what it issues or signs must be under the CA certificates that it publishes"}},
	{est.ErrNotValidNow, judgement{exitRefused, "compare the device's clock with the server's"}},
	{est.ErrHandshake, judgement{exitRefused, "the server, or somebody before it, does not do DTLS 1.2 as RFC 9148 §3 wants it, or TLS 1.2 or 1.3: compare its suites, its key and its certificate with that"}},
	{est.ErrCredentialNotYetValid, judgement{exitTryLater, "the server's clock is not the device's: wait, or set it"}},
	{est.ErrKeyUnsuitable, judgement{exitRefused, "use a key of another key-type; that of an IDevID only the factory changes: ask the people of the server to accept it"}},
	{est.ErrCertificateWanted, judgement{exitRefused, "this server takes no password alone: leave out no-idevid, and give the device a factory credential"}},
	{est.ErrPasswordWanted, judgement{exitRefused, "ask the people of the server for a user and a password: --http-user names the one, --http-password-file the file with the other"}},
	{est.ErrPasswordRefused, judgement{exitRefused, "check http-user and what is in http-password-file; each run tries them once"}},
	{est.ErrPSKRefused, judgement{exitRefused, "check psk-identity and what is in psk-key-file with the people of the server: it may have no pre-shared keys"}},
	{est.ErrPSKUnanswered, judgement{exitTryLater, "check what is in psk-key-file first, then the network; the key of the device is kept for the next run"}},
	{est.ErrCredentialRefused, judgement{exitRefused, "the server does not accept the certificate of this device: ask the people of the server"}},
	{est.ErrUnreachable, judgement{exitTryLater, "check the network and the server's URI; the key and the request are kept for the next run"}},
}
