package est

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Limits of a CoRE Link Format document. A server that ignores the query lists
// all of its resources.
const (
	maxLinks      = 512
	maxParameters = 32 // of one link
)

// A Link is one link of a CoRE Link Format document (RFC 6690 §2).
type Link struct {
	// Target is the URI reference as it came: printable ASCII, not resolved.
	Target string
	// Parameters are in the server's order.
	Parameters []LinkParameter
}

// A LinkParameter is an attribute of a link. Value is without its quotes, and
// empty where there is none.
type LinkParameter struct{ Name, Value string }

// Words returns the values of a parameter that is a list, such as rt or ct. Of a
// parameter that is repeated the first counts (RFC 6690 §3.1: it "MUST NOT appear
// more than once").
func (l Link) Words(name string) []string {
	for _, p := range l.Parameters {
		if strings.EqualFold(p.Name, name) {
			return strings.Fields(p.Value)
		}
	}
	return nil
}

// Has reports whether a link has a parameter.
func (l Link) Has(name string) bool {
	for _, p := range l.Parameters {
		if strings.EqualFold(p.Name, name) {
			return true
		}
	}
	return false
}

// ParseLinks parses a CoRE Link Format document of at most 64 KiB and 512 links:
//
//	Link       = [ link-value *( "," link-value ) ]       RFC 6690 §2
//	link-value = "<" URI-Reference ">" *( ";" link-param )
//	link-param = parmname [ "=" ( ptoken / quoted-string ) ]
//
// Deviation: whitespace between these parts is passed over. RFC 6690 allows none,
// but servers end lines after the commas.
func ParseLinks(document []byte) ([]Link, error) {
	links, err := parseLinks(document)
	if err != nil {
		return nil, fmt.Errorf("link format: %w", err)
	}
	return links, nil
}

func parseLinks(document []byte) ([]Link, error) {
	switch {
	case len(document) > maxAnswer:
		return nil, fmt.Errorf("%d bytes, more than %d", len(document), maxAnswer)
	case !utf8.Valid(document):
		return nil, errors.New("not UTF-8")
	}
	rest := skipSpace(string(document))
	if rest == "" {
		return nil, nil
	}
	var links []Link
	for {
		if len(links) == maxLinks {
			return nil, fmt.Errorf("more than %d links", maxLinks)
		}
		link, after, err := parseLink(rest)
		if err != nil {
			return nil, fmt.Errorf("link %d: %w", len(links)+1, err)
		}
		links = append(links, link)
		if after == "" {
			return links, nil
		}
		if after[0] != ',' {
			return nil, fmt.Errorf("link %d: no comma after it", len(links))
		}
		rest = skipSpace(after[1:])
	}
}

// parseLink parses one link, and returns what follows it and its whitespace.
func parseLink(s string) (link Link, rest string, err error) {
	inside, found := strings.CutPrefix(s, "<")
	if !found {
		return link, "", errors.New("no '<'")
	}
	if link.Target, rest, found = strings.Cut(inside, ">"); !found {
		return link, "", errors.New("no '>'")
	}
	if strings.IndexFunc(link.Target, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '<' || r == '"' }) >= 0 {
		return link, "", errors.New("a target that is no URI reference")
	}
	for rest = skipSpace(rest); strings.HasPrefix(rest, ";"); rest = skipSpace(rest) {
		if len(link.Parameters) == maxParameters {
			return link, "", fmt.Errorf("more than %d parameters", maxParameters)
		}
		var parameter LinkParameter
		if parameter, rest, err = parseParameter(skipSpace(rest[1:])); err != nil {
			return link, "", err
		}
		link.Parameters = append(link.Parameters, parameter)
	}
	return link, rest, nil
}

func parseParameter(s string) (parameter LinkParameter, rest string, err error) {
	parameter.Name, rest = cutToken(s, isAttributeChar)
	if parameter.Name == "" {
		return parameter, "", errors.New("a parameter without a name")
	}
	rest, found := strings.CutPrefix(skipSpace(rest), "=")
	if !found {
		return parameter, rest, nil
	}
	rest = skipSpace(rest)
	if quoted, isQuoted := strings.CutPrefix(rest, `"`); isQuoted {
		parameter.Value, rest, err = parseQuoted(quoted)
	} else if parameter.Value, rest = cutToken(rest, isTokenChar); parameter.Value == "" {
		err = errors.New("no value after '='")
	}
	if err != nil {
		return parameter, "", fmt.Errorf("parameter %.40q: %w", parameter.Name, err)
	}
	return parameter, rest, nil
}

// parseQuoted parses the rest of a quoted-string (RFC 2616 §2.2).
func parseQuoted(s string) (value, rest string, err error) {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '"' {
			return out.String(), s[i+1:], nil
		}
		if c == '\\' {
			if i++; i == len(s) {
				break
			}
			c = s[i]
		}
		if c < ' ' || c == 0x7f {
			return "", "", fmt.Errorf("%q in a quoted value", c)
		}
		out.WriteByte(c)
	}
	return "", "", errors.New("no closing quote")
}

func cutToken(s string, in func(byte) bool) (token, rest string) {
	end := 0
	for end < len(s) && in(s[end]) {
		end++
	}
	return s[:end], s[end:]
}

func isAlphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// isAttributeChar is what a name is made of: attr-char, and the "*" of an
// ext-name-star (RFC 5987 §3.2.1).
func isAttributeChar(c byte) bool {
	return isAlphanumeric(c) || strings.IndexByte("!#$&+-.^_`|~*", c) >= 0
}

// isTokenChar is ptokenchar (RFC 6690 §2).
func isTokenChar(c byte) bool {
	return isAlphanumeric(c) || strings.IndexByte("!#$%&'()*+-./:<=>?@[]^_`{|}~", c) >= 0
}

func skipSpace(s string) string { return strings.TrimLeft(s, " \t\r\n") }
