package est

import (
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
)

// TLSBinding returns the value that a CSR is linked to a TLS connection by, as either
// end has it: tls-unique under TLS 1.2 (RFC 7030 §3.5, RFC 5929 §3.1), tls-exporter
// under TLS 1.3 (RFC 9266 §2). Its error wraps errors.ErrUnsupported where the
// connection has none: crypto/tls tells none of a resumed one without extended master
// secret (RFC 7627 §1), whose value another connection can have too.
func TLSBinding(state tls.ConnectionState) ([]byte, error) {
	if state.Version < tls.VersionTLS13 {
		if len(state.TLSUnique) == 0 {
			return nil, fmt.Errorf("channel binding of TLS: %w", errors.ErrUnsupported)
		}
		return slices.Clone(state.TLSUnique), nil
	}
	binding, err := state.ExportKeyingMaterial("EXPORTER-Channel-Binding", nil, 32)
	if err != nil {
		return nil, fmt.Errorf("channel binding of TLS: %w: %w", err, errors.ErrUnsupported)
	}
	return binding, nil
}
