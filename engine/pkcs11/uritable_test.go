package pkcs11

import (
	"errors"
	"strings"
	"testing"
)

// What the addresses of uriTable select in the token that TestP11Tool makes: by the
// classes of its objects. Three share a label and an id, one has neither.
const (
	refused  = "refused"
	nothing  = "nothing"
	everyone = "cert cert data private public secret-key"
	named    = "cert private public"
	nameless = "cert"

	wrongPIN = "costs a try of the PIN"
)

// uriTable holds addresses with what they select here and, where that is another
// thing, to p11tool (GnuTLS 3.7.9, p11-kit 0.24.1), with the clause that decides.
// {serial}, {slot} and {description} are those of the token and its slot, {module}
// is the path of its module.
var uriTable = []struct {
	uri     string
	selects string
	p11tool string // empty: the same
	why     string // it differs
}{
	// RFC 7512 §2.3: the scheme, the path and its attributes
	{uri: "pkcs11:", selects: everyone},
	{uri: "PKCS11:", selects: everyone},
	{uri: "pKcS11:object=a%20key", selects: named},
	{uri: "pkcs11:token=device", selects: everyone},
	{uri: "pkcs11:token=other", selects: nothing},
	{uri: "pkcs11:token=Device", selects: nothing},
	{uri: "pkcs11:token=dev", selects: nothing},
	{uri: "pkcs11:token=devic%65", selects: everyone},
	{uri: "pkcs11:manufacturer=SoftHSM%20project", selects: everyone},
	{uri: "pkcs11:manufacturer=SoftHSM", selects: nothing},
	{uri: "pkcs11:model=SoftHSM%20v2", selects: everyone},
	{uri: "pkcs11:model=SoftHSM%20v3", selects: nothing},
	{uri: "pkcs11:serial={serial}", selects: everyone},
	{uri: "pkcs11:serial=0000000000000000", selects: nothing},
	{uri: "pkcs11:token=device;serial={serial};manufacturer=SoftHSM%20project;model=SoftHSM%20v2;object=secret", selects: "secret-key"},
	{uri: "pkcs11:object=secret;model=SoftHSM%20v2;manufacturer=SoftHSM%20project;serial={serial};token=device", selects: "secret-key"},
	{uri: "pkcs11:slot-manufacturer=SoftHSM%20project", selects: everyone},
	{uri: "pkcs11:slot-manufacturer=project", selects: nothing, p11tool: everyone, why: "RFC 7512 §2.5: each attribute restricts the selection; GnuTLS 3.7.9 does not look at those of slots"},
	{uri: "pkcs11:slot-description={description}", selects: everyone},
	{uri: "pkcs11:slot-description=SoftHSM", selects: nothing, p11tool: everyone, why: "RFC 7512 §2.5: each attribute restricts the selection; GnuTLS 3.7.9 does not look at those of slots"},
	{uri: "pkcs11:slot-id={slot}", selects: everyone},
	{uri: "pkcs11:slot-id=00{slot}", selects: everyone},
	{uri: "pkcs11:slot-id=1", selects: nothing, p11tool: everyone, why: "RFC 7512 §2.5: each attribute restricts the selection; GnuTLS 3.7.9 does not look at those of slots"},
	{uri: "pkcs11:library-manufacturer=SoftHSM", selects: everyone},
	{uri: "pkcs11:library-manufacturer=Soft", selects: nothing},
	{uri: "pkcs11:library-description=Implementation%20of%20PKCS11", selects: everyone},
	{uri: "pkcs11:library-description=Implementation", selects: nothing},
	{uri: "pkcs11:library-version=2.6", selects: everyone},
	{uri: "pkcs11:library-version=02.06", selects: everyone},
	{uri: "pkcs11:library-version=2.7", selects: nothing},
	{uri: "pkcs11:library-version=2", selects: nothing},
	{uri: "pkcs11:library-version=2.255", selects: nothing, p11tool: refused, why: "RFC 7512 §2.3: each number is one byte; 255 is p11-kit's mark of none"},
	{uri: "pkcs11:object=a%20key", selects: named},
	{uri: "pkcs11:object=a%20key;type=private", selects: "private"},
	{uri: "pkcs11:object=a%20key;type=public", selects: "public"},
	{uri: "pkcs11:object=a%20key;type=cert", selects: "cert"},
	{uri: "pkcs11:object=a%20key;type=data", selects: nothing},
	{uri: "pkcs11:type=cert", selects: "cert cert"},
	{uri: "pkcs11:type=data", selects: "data"},
	{uri: "pkcs11:type=secret-key", selects: "secret-key"},
	{uri: "pkcs11:id=%01%FF", selects: named},
	{uri: "pkcs11:id=%01%ff;type=private", selects: "private"},
	{uri: "pkcs11:id=%01", selects: nothing},
	{uri: "pkcs11:object=some%20data", selects: "data"},
	{uri: "pkcs11:object=a%20key;id=%02", selects: nothing},
	{uri: "pkcs11:object=a+key", selects: nothing},
	{uri: "pkcs11:object=:[]@!$'()*+,=&", selects: nothing},

	// empty values, and blanks, which Cryptoki pads with (RFC 7512 §2.3, §2.5)
	{uri: "pkcs11:token=", selects: nothing},
	{uri: "pkcs11:serial=", selects: nothing},
	{uri: "pkcs11:library-description=", selects: nothing},
	{uri: "pkcs11:object=", selects: nameless},
	{uri: "pkcs11:id=", selects: nameless},
	{uri: "pkcs11:object=;id=;type=cert", selects: nameless},
	{uri: "pkcs11:token=device%20", selects: everyone},
	{uri: "pkcs11:token=%20device", selects: nothing},
	{uri: "pkcs11:type=", selects: refused, p11tool: nothing, why: "RFC 7512 §2.3: pk11-type is one of five words"},
	{uri: "pkcs11:slot-id=", selects: refused, p11tool: everyone, why: "RFC 7512 §2.3: pk11-slot-id is at least one digit"},
	{uri: "pkcs11:library-version=", selects: refused},

	// values that are none
	{uri: "pkcs11:type=key", selects: refused, p11tool: nothing, why: "RFC 7512 §2.3: pk11-type is one of five words"},
	{uri: "pkcs11:type=%70ublic", selects: refused, p11tool: nothing, why: "RFC 7512 §2.3: pk11-type has no percent-encoding"},
	{uri: "pkcs11:slot-id=one", selects: refused},
	{uri: "pkcs11:slot-id=99999999999999999999", selects: refused, p11tool: everyone, why: "RFC 7512 §2.3: no CK_SLOT_ID has more than 64 bits"},
	{uri: "pkcs11:slot-id=+1", selects: refused},
	{uri: "pkcs11:library-version=2.", selects: refused},
	{uri: "pkcs11:library-version=.6", selects: refused},
	{uri: "pkcs11:library-version=2.256", selects: refused},
	{uri: "pkcs11:library-version=2.6.1", selects: refused},
	{uri: "pkcs11:object=%", selects: refused},
	{uri: "pkcs11:object=%4", selects: refused},
	{uri: "pkcs11:object=%4g", selects: refused},
	{uri: "pkcs11:object=%+4", selects: refused},
	{uri: "pkcs11:token=%ff", selects: refused, p11tool: nothing, why: "RFC 7512 §2.3: text is UTF-8 below its percent-encoding"},
	{uri: "pkcs11:token=device%00", selects: refused, p11tool: nothing, why: "RFC 3986 §7.3: %00 is for raw data only"},
	{uri: "pkcs11:token=" + strings.Repeat("a", maxText+1), selects: refused, p11tool: nothing,
		why: "RFC 7512 §2.3 sets no limit, but every member that is compared has one (PKCS #11 v2.40 §3): no input is unbounded here"},

	// names (RFC 7512 §2.3, §2.5)
	{uri: "pkcs11:TOKEN=device", selects: everyone, p11tool: nothing, why: "RFC 5234 §2.3: a quoted word of a grammar is in any case"},
	{uri: "pkcs11:type=PUBLIC", selects: "public", p11tool: nothing, why: "RFC 5234 §2.3: a quoted word of a grammar is in any case"},
	{uri: "pkcs11:x-vendor=1", selects: nothing},
	{uri: "pkcs11:token=device;vendor_1=%20", selects: nothing},
	{uri: "pkcs11:vendor=", selects: nothing},
	{uri: "pkcs11:seriall={serial}", selects: nothing},
	{uri: "pkcs11:object-type=public", selects: nothing, p11tool: "public", why: "RFC 7512 §2.3 has type; §2.5: what is unknown matches nothing; p11-kit takes the name of an old draft"},
	{uri: "pkcs11:x-vendor=1;x-vendor=1", selects: refused, p11tool: nothing, why: "RFC 7512 §2.3: no attribute stands in the path twice"},
	{uri: "pkcs11:token=device;token=device", selects: refused, p11tool: everyone, why: "RFC 7512 §2.3: no attribute stands in the path twice"},
	{uri: "pkcs11:token=;token=device", selects: refused, p11tool: everyone, why: "RFC 7512 §2.3: no attribute stands in the path twice"},
	{uri: "pkcs11:id=%01;id=%01%ff", selects: refused, p11tool: named, why: "RFC 7512 §2.3: no attribute stands in the path twice"},
	{uri: "pkcs11:=device", selects: refused},
	{uri: "pkcs11:to%6ben=device", selects: refused, p11tool: nothing, why: "RFC 7512 §2.3: a name is letters, digits, \"-\" and \"_\""},
	{uri: "pkcs11:x.vendor=1", selects: refused, p11tool: nothing, why: "RFC 7512 §2.3: a name is letters, digits, \"-\" and \"_\""},
	{uri: "pkcs11:token=device;pin-value=4711-user", selects: refused, p11tool: everyone, why: "RFC 7512 §2.3: pin-value is an attribute of the query, and no vendor's name clashes with it"},
	{uri: "pkcs11:token=device?object=secret", selects: refused, p11tool: everyone, why: "RFC 7512 §2.3: object is an attribute of the path, and no vendor's name clashes with it"},
	{uri: "pkcs11:pinfile=/nonexistent", selects: refused, p11tool: everyone,
		why: "RFC 7512 §2.3 has pin-source: what looks like a misspelt attribute of a PIN is not taken for a vendor's (a deviation; p11-kit takes the name of an old draft)"},

	// separators and characters
	{uri: "token=device", selects: refused},
	{uri: "pkcs11", selects: refused},
	{uri: "pkcs12:token=device", selects: refused},
	{uri: "pkcs11:token", selects: refused},
	{uri: "pkcs11:token=device;", selects: refused, p11tool: everyone, why: "RFC 7512 §2.3: a \";\" stands between two attributes"},
	{uri: "pkcs11:;token=device", selects: refused, p11tool: everyone, why: "RFC 7512 §2.3: a \";\" stands between two attributes"},
	{uri: "pkcs11:token=device;;type=public", selects: refused, p11tool: everyone, why: "RFC 7512 §2.3: a \";\" stands between two attributes; p11-kit reads no further"},
	{uri: "pkcs11://token=device", selects: refused, p11tool: nothing, why: "RFC 7512 §2.3: the path has no \"/\", not even two before it"},
	{uri: "pkcs11:object=a/key", selects: refused, p11tool: nothing, why: "RFC 7512 §2.3: \"/\" is percent-encoded in the path"},
	{uri: "pkcs11:object=a%2Fkey", selects: nothing},
	{uri: "pkcs11:object=a%20key#fragment", selects: refused, p11tool: nothing, why: "RFC 7512 §2.3: there is no fragment, and \"#\" is percent-encoded"},
	{uri: "pkcs11: object=a%20key", selects: refused, p11tool: named, why: "RFC 3986 §2: a URI has no blank; p11-kit takes them out"},
	{uri: "pkcs11:object=a key", selects: refused, p11tool: nothing, why: "RFC 3986 §2: a URI has no blank; p11-kit takes them out"},
	{uri: "pkcs11:token=device\n", selects: refused, p11tool: everyone, why: "RFC 3986 §2: a URI has no newline; p11-kit takes them out"},
	{uri: "pkcs11:object=ü", selects: refused, p11tool: nothing, why: "RFC 3986 §2: a URI is ASCII"},
	{uri: "pkcs11:object=%c3%bc", selects: nothing},
	{uri: "pkcs11:object=\"a%20key\"", selects: refused, p11tool: nothing, why: "RFC 3986 §2: a quote is percent-encoded"},

	// RFC 7512 §2.4: the query
	{uri: "pkcs11:token=device?", selects: everyone},
	{uri: "pkcs11:?pin-value=4711-user", selects: everyone},
	{uri: "pkcs11:object=secret?pin-value=4711%2Duser", selects: "secret-key"},
	{uri: "pkcs11:?PIN-VALUE=4711-user", selects: everyone, p11tool: refused, why: "RFC 5234 §2.3: a quoted word of a grammar is in any case"},
	{uri: "pkcs11:?x-vendor=1", selects: everyone},
	{uri: "pkcs11:?X-Vendor=1", selects: everyone, p11tool: refused, why: "RFC 7512 §2.3: a name is letters of either case, digits, \"-\" and \"_\""},
	{uri: "pkcs11:?vendor=1&vendor=2&vendor=1", selects: everyone},
	{uri: "pkcs11:?vendor=", selects: everyone},
	{uri: "pkcs11:?vendor=:[]@!$'()*+,=/?|", selects: everyone},
	{uri: "pkcs11:?module-path={module}", selects: everyone},
	{uri: "pkcs11:?module-name=softhsm2", selects: everyone},
	{uri: "pkcs11:?module-name=SoftHSM2", selects: everyone},
	{uri: "pkcs11:?module-name=other", selects: nothing, p11tool: everyone, why: "RFC 7512 §2.5: only modules that match are worked with; p11tool has one by --provider"},
	{uri: "pkcs11:?module-path=/nonexistent.so", selects: nothing, p11tool: everyone, why: "RFC 7512 §2.5: only modules that match are worked with; p11tool has one by --provider"},
	{uri: "pkcs11:?module-path=softhsm2.so", selects: refused, p11tool: everyone, why: "RFC 7512 §2.4: a relative path is rejected"},
	{uri: "pkcs11:?module-path=", selects: refused, p11tool: everyone, why: "RFC 7512 §2.4: a relative path is rejected, and an empty one is not absolute"},
	{uri: "pkcs11:?module-name=/softhsm2", selects: refused, p11tool: everyone, why: "RFC 7512 §2.4: a module's name is \"not path nor filename\""},
	{uri: "pkcs11:?module-name=", selects: refused, p11tool: everyone, why: "RFC 7512 §2.4: it names no module (a deviation, the grammar has it)"},
	{uri: "pkcs11:?pin-value=4711-user&pin-source=/nonexistent", selects: refused, p11tool: everyone, why: "RFC 7512 §2.4: an address with both is refused as invalid"},
	{uri: "pkcs11:?pin-value=4711-user&pin-value=1", selects: refused, p11tool: wrongPIN, why: "RFC 7512 §2.4: only vendors' attributes may stand in the query twice"},
	{uri: "pkcs11:?pin-value=", selects: refused, p11tool: wrongPIN, why: "DESIGN.md §5: an empty PIN is never tried (a deviation from RFC 7512 §2.3; tpm2-pkcs11 answers CKR_HOST_MEMORY)"},
	{uri: "pkcs11:?pin-value=4711&-user=1", selects: refused, p11tool: wrongPIN,
		why: "RFC 7512 §2.3: \"&\" delimits; what follows pin-value may be the rest of a PIN, and its half costs a try (a deviation)"},
	{uri: "pkcs11:?pin-valeu=4711-user", selects: refused, p11tool: everyone,
		why: "RFC 7512 §2.4: what looks like a misspelt attribute of a PIN is not taken for a vendor's, which would be ignored (a deviation)"},
	{uri: "pkcs11:?pin-source=|cat%20/pin", selects: refused, p11tool: everyone, why: "RFC 7512 §2.4 leaves to the consumer what a source is: no command is run (a deviation)"},
	{uri: "pkcs11:?pin-source=https://example.com/pin", selects: refused, p11tool: everyone, why: "RFC 7512 §2.4 leaves to the consumer what a source is: a file (a deviation)"},
	{uri: "pkcs11:?pin-source=pin", selects: refused, p11tool: everyone, why: "RFC 7512 §2.4 leaves to the consumer what a source is: no relative path (a deviation)"},
	{uri: "pkcs11:?vendor", selects: refused},
	{uri: "pkcs11:?&", selects: refused},
	{uri: "pkcs11:?vendor=1&", selects: refused, p11tool: everyone, why: "RFC 7512 §2.3: a \"&\" stands between two attributes"},
	{uri: "pkcs11:?vendor=1&&vendor=2", selects: refused},
	{uri: "pkcs11:?vendor=ü", selects: refused, p11tool: everyone, why: "RFC 3986 §2: a URI is ASCII"},
	{uri: "pkcs11:?a?b=1", selects: refused},
	{uri: "pkcs11:?vendor=%4", selects: refused},
}

// Of each address of the table: parse, format and parse again is the identity.
func TestURITable(t *testing.T) {
	t.Parallel()
	if len(uriTable) < 60 {
		t.Fatalf("only %d addresses", len(uriTable))
	}
	fill := strings.NewReplacer("{serial}", "0123456789abcdef", "{slot}", "4711", "{description}", "a%20slot", "{module}", "/m.so")
	for _, row := range uriTable {
		s := fill.Replace(row.uri)
		u, err := ParseURI(s)
		var parse *ParseError
		switch {
		case (err != nil) != (row.selects == refused), err != nil && !errors.As(err, &parse):
			t.Errorf("%s: %v, want %s", s, err, row.selects)
			continue
		case err != nil:
			continue
		}
		whole := u.format(true)
		again, err := ParseURI(whole)
		if err != nil || again != u || again.format(true) != whole {
			t.Errorf("%s: %s: %v, want the same", s, whole, err)
		}
	}
}
