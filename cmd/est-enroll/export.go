package main

import (
	"context"
	"errors"

	"estenroll"
	"estenroll/engine"
	"estenroll/engine/pkcs11"
	"estenroll/internal/agent"
)

// export gives the other programs of the device the credential that is in place,
// whatever the run itself has come to, which it returns: an earlier one may have
// been killed before it could. Where nothing is enrolled, what they have is left to
// them.
func (s *settings) export(ctx context.Context, credential *estenroll.Credential, out *output, outcome error) error {
	if s.exportDir == "" {
		return outcome
	}
	// Ctrl-C does not stop this: it is short, and what it writes is true.
	public, err := credential.Public(context.WithoutCancel(ctx))
	switch {
	case err == nil:
	case errors.Is(err, estenroll.ErrNotEnrolled), outcome != nil: // the token's error is said already
		return outcome
	default:
		return err
	}
	export := agent.Export{
		Dir: s.exportDir, Name: credential.Name(),
		Key: s.forPrograms(public.Key), Certificate: s.forPrograms(public.Certificates[0]),
		Chain: public.Chain, TrustAnchors: public.TrustAnchors,
	}
	changed, err := export.Write()
	if err != nil {
		return errors.Join(outcome, err)
	}
	if changed {
		out.progress(estenroll.Event{Step: "export", Message: "wrote " + s.exportDir + "/" + credential.Name() + " for other programs"})
	}
	return outcome
}

// removeExport takes away what names a key that is destroyed.
func (s *settings) removeExport(credential *estenroll.Credential) error {
	if s.exportDir == "" {
		return nil
	}
	return agent.Remove(s.exportDir, credential.Name())
}

// forPrograms is the address of an object as other programs take it.
func (s *settings) forPrograms(at engine.Address) string {
	if object, ok := at.(pkcs11.URI); ok {
		if token, err := pkcs11.ParseURI(s.engine); err == nil {
			return object.ForPrograms(token)
		}
	}
	return at.String()
}
