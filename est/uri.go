package est

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// The schemes of an EST server's URI, which say how EST is carried.
const (
	SchemeCoAPs = "coaps"
	SchemeHTTPS = "https"
)

// defaultPorts by scheme (RFC 7252 §6.2, RFC 9110 §4.2.2).
var defaultPorts = map[string]uint16{SchemeCoAPs: 5684, SchemeHTTPS: 443}

const maxURI = 1024 // bytes

// URI is where an EST server is: coaps://host[:port][/path] (RFC 7252 §6.2) or
// https://host[:port][/path] (RFC 9110 §4.2.2).
type URI struct {
	Scheme string
	// Host is a DNS name or an IP literal, without brackets.
	Host string
	Port uint16
	// Root is the path that the operations' names follow (RFC 9148 §4.1).
	Root string
}

// ParseURI parses a URI; the port is its scheme's and the path /.well-known/est
// unless they are given. User, query and fragment are refused, as is a path whose
// segments would change on the way.
func ParseURI(s string) (URI, error) {
	if len(s) > maxURI {
		return URI{}, fmt.Errorf("EST server URI: %d bytes, more than %d", len(s), maxURI)
	}
	u, err := url.Parse(s)
	if err != nil {
		var cause *url.Error
		if errors.As(err, &cause) {
			err = cause.Err
		}
		return URI{}, fmt.Errorf("EST server URI: %w", err)
	}
	wrong := func(reason string) (URI, error) { return URI{}, fmt.Errorf("EST server URI: %s", reason) }
	switch {
	case defaultPorts[u.Scheme] == 0:
		return wrong("want coaps:// or https://host[:port][/path]")
	case u.User != nil:
		return wrong("it names a user: credentials are no part of it")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || strings.Contains(s, "#"):
		return wrong("it has a query or a fragment")
	case u.Opaque != "" || u.Hostname() == "":
		return wrong("it has no host")
	}
	result := URI{Scheme: u.Scheme, Host: u.Hostname(), Port: defaultPorts[u.Scheme], Root: strings.TrimSuffix(u.Path, "/")}
	if address, err := netip.ParseAddr(result.Host); err == nil && address.Zone() != "" {
		// Which link it is means something to one machine alone, and to no certificate.
		return wrong("its address has a zone, as link-local addresses need: give the server a name, or an address without")
	}
	if strings.Contains(result.Host, ":") && !strings.HasPrefix(u.Host, "[") {
		// net/url takes what follows the last colon for a port, but over https.
		return wrong("want an IPv6 address in brackets (RFC 3986 §3.2.2)")
	}
	if !validHost(result.Host) {
		return wrong("its host is neither a DNS name nor an IP address")
	}
	if text := u.Port(); text != "" || strings.HasSuffix(u.Host, ":") {
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil || port == 0 {
			return wrong("its port is not a number from 1 to 65535")
		}
		result.Port = uint16(port)
	}
	if u.Path == "" || u.Path == "/" {
		result.Root = DefaultRoot
		return result, nil
	}
	if u.RawPath != "" {
		return wrong("its path has escapes that would be lost")
	}
	if !ValidPath(result.Root) {
		return wrong("its path has a segment that is empty, a dot, not printable ASCII or longer than 255 bytes")
	}
	return result, nil
}

// ValidPath reports whether a path arrives as it is: each segment is one Uri-Path
// option (RFC 7252 §5.10), and none has to be escaped.
func ValidPath(path string) bool {
	segments, found := strings.CutPrefix(path, "/")
	if !found {
		return false
	}
	for segment := range strings.SplitSeq(segments, "/") {
		if segment == "" || segment == "." || segment == ".." || len(segment) > 255 || !printable(segment) {
			return false
		}
	}
	return true
}

func validHost(host string) bool {
	if address, err := netip.ParseAddr(host); err == nil {
		return address.Zone() == ""
	}
	for label := range strings.SplitSeq(host, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "-") != label {
			return false
		}
		for _, r := range label {
			if !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '-' || r == '_') {
				return false
			}
		}
	}
	return len(host) <= 253
}

func printable(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '%' }) < 0
}

// WithLabel returns the URI of the CA that a label names (RFC 7030 §3.2.2).
func (u URI) WithLabel(label Label) URI {
	if label != "" {
		u.Root += "/" + string(label)
	}
	return u
}

// String returns the whole URI, with its port and path.
func (u URI) String() string {
	return u.Scheme + "://" + u.Address() + (&url.URL{Path: u.Root}).EscapedPath()
}

// Address returns host:port, to connect to.
func (u URI) Address() string { return net.JoinHostPort(u.Host, strconv.Itoa(int(u.Port))) }

// ServerName is what is sent as SNI: "Literal IPv4 and IPv6 addresses are not
// permitted" (RFC 6066 §3).
func (u URI) ServerName() string {
	if _, err := netip.ParseAddr(u.Host); err == nil {
		return ""
	}
	return u.Host
}
