package est

import (
	"errors"
	"fmt"
	"slices"
)

// Label names one of several CAs of a server: a path segment between the EST
// root and the operation (RFC 7030 §3.2.2, RFC 9148 §4.1). Empty is none.
type Label string

// operationSegments are the path segments of operations, with those of RFC 7030
// and of RFC 9148 that this package does not have.
var operationSegments = []string{
	"cacerts", "simpleenroll", "simplereenroll", "fullcmc", "serverkeygen", "csrattrs",
	"crts", "sen", "sren", "skg", "skc", "att",
}

const maxLabel = 255 // bytes of a Uri-Path option (RFC 7252 §5.10)

// ParseLabel parses a label: one path segment of printable ASCII, of at most 255
// bytes, that would not have to be escaped, and that is no operation's, which it
// "MUST NOT be the same as" (RFC 7030 §3.2.2).
func ParseLabel(s string) (Label, error) {
	switch {
	case s == "" || len(s) > maxLabel:
		return "", fmt.Errorf("label: want 1 to %d bytes", maxLabel)
	case s == "." || s == "..":
		return "", errors.New("label: a dot is no name")
	case slices.Contains(operationSegments, s):
		return "", fmt.Errorf("label: %q is the name of an operation", s)
	}
	for _, r := range s {
		if !isSegmentChar(r) {
			return "", fmt.Errorf("label: %q has no place in it", r)
		}
	}
	return Label(s), nil
}

// isSegmentChar is pchar without what is escaped (RFC 3986 §3.3).
func isSegmentChar(r rune) bool {
	const others = "-._~!$&'()*+,;=:@"
	if r < 0x80 && isAlphanumeric(byte(r)) {
		return true
	}
	return slices.Contains([]rune(others), r)
}
