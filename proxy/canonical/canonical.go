// Package canonical gives the parts of an HTTP request their one spelling, or
// refuses them. Rules are written in it, requests are decided on in it, and
// these very bytes are forwarded: what is decided on is what the service sees.
//
//	t, err := canonical.ParseTarget(method, target, canonical.Options{})
//	host, err := canonical.Authority(t, hosts)
//	name, err := canonical.HeaderName(rawName)
//	value, err := canonical.HeaderValue(rawValue)
//
// Every function returns input that is canonical already as it is and without
// allocating, takes time linear in the input, and refuses what is longer than
// the Max constants. Applied to its own result it changes nothing. Every error
// is an [*Error].
//
// # What is changed
//
//	path     %41 to A: escapes of whatever may stand in a path unescaped, such as ~ : @ ! $ & ' ( ) * + , =
//	path     %c3 to %C3: other escapes get capital letters (RFC 3986, section 6.2.2.1)
//	target   http://host to /, and to * for OPTIONS (RFC 9112, sections 3.2.1 and 3.2.4)
//	host     Example.ORG. to example.org; [2001:DB8:0::1] to [2001:db8::1]
//	header   names to lower case; spaces and tabs around values go (RFC 9110, section 5.5)
//
// # What is refused
//
//	method   lower case, or no token                    services differ on whether get is GET
//	path     . and .., also as %2e, beside spaces, or before ; or an allowed %2F   services resolve them to another path
//	path     // (unless allowed)                                services merge it
//	path     %2F (unless allowed)                               some services split at it, some do not
//	path     \ and %5C                                          a slash on Windows
//	path     ; and %3B                                          some services cut parameters off each segment
//	path     %25 before two hexadecimal digits or u and four    becomes another escape where it is decoded twice
//	path     % without two hexadecimal digits, %u002f           each service guesses what is meant
//	path     escapes that are no UTF-8, such as %c0%af          lenient decoders make a slash of it
//	path     / . \ ; % as fullwidth and similar characters      become those of ASCII where Unicode is normalised (NFKC)
//	path     control characters, NUL first, escaped too         cut strings and lines short
//	path     # ? and what RFC 3986 keeps out of paths: "<>[]^`{|} space, non-ASCII   services cut, escape or drop it
//	query    control characters, space, #, non-ASCII            ends the query, or the request line
//	target   host:port, CONNECT, * but for OPTIONS, other schemes than http and https   no path to decide on
//	host     user@host, commas, spaces, empty labels, non-ASCII  services disagree on which part is the host
//	host     ports with leading zeros, 0, above 65535, empty    one port, several spellings
//	host     127.1, 0x7f000001, 010.0.0.1, [::ffff:10.0.0.1]    other spellings of an IPv4 address
//	host     zones: [fe80::1%25eth0]                            mean something on one machine only
//	host     none, several, another one than in the target      which one counts differs (RFC 9112, section 3.2)
//	header   names that are no token, such as "host "           smuggle a field past whoever trims
//	header   control characters in values but the tab           end the line, or the header
//
// # Escapes of delimiters
//
// RFC 3986, section 2.2, holds %3A and : apart, while nearly every service
// decodes the path before it looks at it. Were they two spellings here too, a
// deny of /v1/job:stop would be passed as /v1/job%3Astop. So there is one: the
// delimiter itself. That is safe to forward, as a service that does tell them
// apart sees the delimiter that the rules were asked about. What is given up:
// through this proxy no service can be sent the escape.
//
// # What is left alone
//
// Case, Unicode normal forms (é as one character or two), a slash at the end,
// dots and spaces at the end of a segment, and + for a space: these are
// different paths here. A service that takes two of them for one needs rules
// that name both.
package canonical

// The bounds. What is longer is refused.
const (
	MaxMethod      = 32       // in bytes
	MaxTarget      = 8 << 10  // of a request target, path and query together; in bytes
	MaxSegments    = 128      // of a path
	MaxHost        = 255      // of a host, without the port; in bytes
	MaxHeaderName  = 256      // in bytes
	MaxHeaderValue = 16 << 10 // in bytes, the white space around it included
)

// Options says what a listener's services are known to take literally. The
// zero value suits every service.
type Options struct {
	// EncodedSlash lets %2F stand in a segment, and keeps it so. It is safe
	// only where no service decodes the path before splitting it.
	EncodedSlash bool
	// EmptySegments lets // stand in a path, also at its start, and keeps it
	// so. It is safe only where no service merges slashes, or resolves the
	// target as a reference, in which //a/b is path /b of host a.
	EmptySegments bool
}
