package telemetry

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Access is one record of the access log: a connection, or a request on one.
// Field names on the wire are those of the Elastic Common Schema, dotted and
// flat; what ECS has no word for stands under narthex. A field that is empty
// is left out. Records hold no key, token, query string or body.
type Access struct {
	Time     time.Time     // when it ended
	Action   string        // connection | request
	Outcome  string        // success | failure
	Reason   string        // why it ended or was refused, for a person
	Duration time.Duration // from accept, or of a request from its first byte, to end

	Listener   string
	Direction  string // inbound | outbound
	From, To   string // SPIFFE IDs; From is unauthenticated where Plaintext is set
	Plaintext  bool   // the client proved nothing and spoke plaintext to a listener that takes it
	Serial     string // of the peer's certificate, hexadecimal
	Decision   string // allow | deny | would_deny; empty where it never came to one
	WouldDeny  string // why the policy refuses it, where the listener only audits
	Rule       string
	Shadow     []string // rules in shadow that would have decided otherwise
	Limit      string   // the limit that refused it
	Generation uint64   // of the policy that decided last
	Closed     string   // policy | expiry | revoked | drain | peer | error

	Source, Destination  string // ip:port, or unix:/path; the upstream dialled
	Via                  string // the proxy whose PROXY header named Source
	Port                 uint16 // of the mTLS side: accepted on, or outbound dialled
	BytesIn, BytesOut    uint64 // from source to destination, and back
	TLSVersion, Cipher   string
	ServerName, Protocol string // SNI; ALPN protocol

	HTTP *AccessHTTP // of a request
}

// AccessHTTP is the part of a record that only an HTTP listener can fill.
// `narthex policy` reads it back to replay and to suggest rules.
type AccessHTTP struct {
	Method, Host, Path string
	Status             int
	RequestID          string
	UserAgent          string
}

// AppendJSON appends the record as one JSON object without a line end.
func (a *Access) AppendJSON(b []byte) []byte {
	b = append(b, `{"@timestamp":"`...)
	b = a.Time.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z")
	b = append(b, `","ecs.version":"8.17.0"`...)
	b = appendString(b, "event.action", a.Action)
	b = appendString(b, "event.outcome", a.Outcome)
	b = appendString(b, "event.reason", a.Reason)
	b = appendUint(b, "event.duration", uint64(max(a.Duration, 0)))
	b = appendString(b, "narthex.listener", a.Listener)
	b = appendString(b, "narthex.direction", a.Direction)
	b = appendString(b, "narthex.from", a.From)
	b = appendString(b, "narthex.to", a.To)
	if a.Plaintext {
		b = append(b, `,"narthex.plaintext":true`...)
	}
	b = appendString(b, "narthex.decision", a.Decision)
	b = appendString(b, "narthex.would_deny", a.WouldDeny)
	b = appendString(b, "narthex.rule", a.Rule)
	if len(a.Shadow) > 0 {
		b = append(b, `,"narthex.shadow":[`...)
		for i, s := range a.Shadow {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendQuoted(b, s)
		}
		b = append(b, ']')
	}
	b = appendString(b, "narthex.limit", a.Limit)
	b = appendUint(b, "narthex.policy.generation", a.Generation)
	b = appendString(b, "narthex.closed", a.Closed)
	b = appendString(b, "narthex.peer.serial", a.Serial)
	b = appendAddress(b, "source", a.Source)
	b = appendUint(b, "source.bytes", a.BytesIn)
	b = appendString(b, "narthex.via", a.Via)
	b = appendUint(b, "server.port", uint64(a.Port))
	b = appendAddress(b, "destination", a.Destination)
	b = appendUint(b, "destination.bytes", a.BytesOut)
	b = appendString(b, "tls.version", a.TLSVersion)
	b = appendString(b, "tls.cipher", a.Cipher)
	b = appendString(b, "tls.next_protocol", a.Protocol)
	b = appendString(b, "tls.client.server_name", a.ServerName)
	if h := a.HTTP; h != nil {
		b = appendString(b, "http.request.method", h.Method)
		b = appendString(b, "http.request.id", h.RequestID)
		b = appendString(b, "url.domain", h.Host)
		b = appendString(b, "url.path", h.Path)
		b = appendString(b, "user_agent.original", h.UserAgent)
		b = appendUint(b, "http.response.status_code", uint64(max(h.Status, 0)))
	}
	return append(b, '}')
}

// AppendText appends the record as one line for a person, without a line end.
// What is empty is a dash.
func (a *Access) AppendText(b []byte) []byte {
	b = a.Time.UTC().AppendFormat(b, time.RFC3339)
	verdict := a.Decision
	if verdict == "" {
		verdict = "refused"
	}
	b = fmt.Appendf(b, " %s %s %s %s -> %s", a.Listener, a.Direction, verdict, orDash(a.From), orDash(a.To))
	if a.HTTP != nil {
		status := "" // of a request that nobody answered
		if a.HTTP.Status > 0 {
			status = strconv.Itoa(a.HTTP.Status)
		}
		b = fmt.Appendf(b, " %s %s", quotedOrDash(strings.TrimSpace(a.HTTP.Method+" "+a.HTTP.Path)), orDash(status))
	}
	return fmt.Appendf(b, " rule=%s source=%s bytes=%d/%d %s %s",
		orDash(a.Rule), orDash(a.Source), a.BytesIn, a.BytesOut, a.Duration.Round(time.Microsecond), quotedOrDash(a.Reason))
}

func quotedOrDash(s string) string {
	if s == "" {
		return "-"
	}
	return strconv.Quote(s)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func appendKey(b []byte, key string) []byte {
	b = append(b, ',', '"')
	b = append(b, key...)
	return append(b, '"', ':')
}

func appendString(b []byte, key, s string) []byte {
	if s == "" {
		return b
	}
	return appendQuoted(appendKey(b, key), s)
}

func appendUint(b []byte, key string, n uint64) []byte {
	if n == 0 {
		return b
	}
	return strconv.AppendUint(appendKey(b, key), n, 10)
}

// maxValue bounds a value, in bytes: a SPIFFE ID has at most 2048, and what is
// longer was sent by somebody who wants the log to grow.
const maxValue = 2048

// appendQuoted takes the short way for the plain text that nearly every value
// is, and encoding/json's for the rest: a peer chooses some of these bytes.
func appendQuoted(b []byte, s string) []byte {
	if len(s) > maxValue {
		s = strings.ToValidUTF8(s[:maxValue], "") + "…"
	}
	for i := range len(s) {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c >= 0x7f {
			return appendEscaped(b, s)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}

// appendEscaped escapes, beside what JSON asks for, what a terminal or an
// editor would obey: DEL, the C1 controls and the marks that turn the
// direction of text.
func appendEscaped(b []byte, s string) []byte {
	quoted, err := json.Marshal(s)
	if err != nil { // cannot happen for a string
		return append(b, `""`...)
	}
	for _, r := range string(quoted) {
		if r == 0x7f || unicode.In(r, unicode.Cc, unicode.Cf) {
			for _, unit := range utf16.Encode([]rune{r}) {
				b = fmt.Appendf(b, `\u%04x`, unit)
			}
			continue
		}
		b = utf8.AppendRune(b, r)
	}
	return b
}

func appendAddress(b []byte, side, addr string) []byte {
	if addr == "" {
		return b
	}
	b = appendString(b, side+".address", addr)
	if ap, err := netip.ParseAddrPort(addr); err == nil {
		if ap.Addr().Zone() != "" { // which may need escapes
			b = appendString(b, side+".ip", ap.Addr().String())
		} else {
			b = append(appendKey(b, side+".ip"), '"')
			b = append(ap.Addr().AppendTo(b), '"')
		}
		b = appendUint(b, side+".port", uint64(ap.Port()))
	}
	return b
}

// UnmarshalJSON reads a record that AppendJSON wrote. Fields it does not know
// are passed over.
func (a *Access) UnmarshalJSON(data []byte) error {
	var r struct {
		Time        time.Time     `json:"@timestamp"`
		Action      string        `json:"event.action"`
		Outcome     string        `json:"event.outcome"`
		Reason      string        `json:"event.reason"`
		Duration    time.Duration `json:"event.duration"`
		Listener    string        `json:"narthex.listener"`
		Direction   string        `json:"narthex.direction"`
		From        string        `json:"narthex.from"`
		To          string        `json:"narthex.to"`
		Plaintext   bool          `json:"narthex.plaintext"`
		Decision    string        `json:"narthex.decision"`
		WouldDeny   string        `json:"narthex.would_deny"`
		Rule        string        `json:"narthex.rule"`
		Shadow      []string      `json:"narthex.shadow"`
		Limit       string        `json:"narthex.limit"`
		Generation  uint64        `json:"narthex.policy.generation"`
		Closed      string        `json:"narthex.closed"`
		Serial      string        `json:"narthex.peer.serial"`
		Source      string        `json:"source.address"`
		BytesIn     uint64        `json:"source.bytes"`
		Via         string        `json:"narthex.via"`
		Port        uint16        `json:"server.port"`
		Destination string        `json:"destination.address"`
		BytesOut    uint64        `json:"destination.bytes"`
		TLSVersion  string        `json:"tls.version"`
		Cipher      string        `json:"tls.cipher"`
		Protocol    string        `json:"tls.next_protocol"`
		ServerName  string        `json:"tls.client.server_name"`
		Method      string        `json:"http.request.method"`
		RequestID   string        `json:"http.request.id"`
		Host        string        `json:"url.domain"`
		Path        string        `json:"url.path"`
		UserAgent   string        `json:"user_agent.original"`
		Status      int           `json:"http.response.status_code"`
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return fmt.Errorf("read access record: %w", err)
	}
	*a = Access{
		Time: r.Time, Action: r.Action, Outcome: r.Outcome, Reason: r.Reason, Duration: r.Duration,
		Listener: r.Listener, Direction: r.Direction, From: r.From, To: r.To, Serial: r.Serial,
		Plaintext: r.Plaintext, WouldDeny: r.WouldDeny, Decision: r.Decision, Rule: r.Rule, Shadow: r.Shadow, Limit: r.Limit, Generation: r.Generation, Closed: r.Closed,
		Source: r.Source, Via: r.Via, Port: r.Port, Destination: r.Destination, BytesIn: r.BytesIn, BytesOut: r.BytesOut,
		TLSVersion: r.TLSVersion, Cipher: r.Cipher, ServerName: r.ServerName, Protocol: r.Protocol,
	}
	if r.Method != "" {
		a.HTTP = &AccessHTTP{Method: r.Method, Host: r.Host, Path: r.Path, Status: r.Status, RequestID: r.RequestID, UserAgent: r.UserAgent}
	}
	return nil
}

// CloseReasons are the values of Access.Closed and of the metric
// narthex_connections_closed_total.
var CloseReasons = strings.Fields("policy expiry revoked drain peer error")
