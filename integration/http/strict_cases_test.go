//go:build integration

package http_test

import (
	"fmt"
	"strings"
)

// odd is a request that some reader somewhere understands in another way than
// the next one, or that says who sent it. After each a good request is sent on
// the same connection at once: `/last`.
type odd struct {
	name string
	raw  string // {case} stands for what tells this one's paths from the others'
	// laxer is why we serve what nginx or haproxy refuses.
	laxer string
	// ends is for requests that we refuse though it is clear where they end:
	// what follows is served.
	ends bool
}

// oddities is a part of the table.
type oddities struct {
	title string
	of    []odd
}

// hidden is the request that must not be seen: it stands in the body of
// another one.
const hidden = "GET {case}/hidden HTTP/1.1\r\nHost: a.example\r\n\r\n"

// last is the good request behind each.
const last = "GET {case}/last HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"

const host = "Host: a.example\r\n"

// tagged is for requests whose target cannot tell which one they are.
const tagged = "N: {case}\r\n"

// get is a GET with these field lines, post a POST with a body.
func get(fields string) string { return "GET {case}/x HTTP/1.1\r\n" + host + fields + "\r\n" }

func post(fields, body string) string {
	return "POST {case}/x HTTP/1.1\r\n" + host + fields + "\r\n" + body
}

// chunked is a POST whose chunks are given as they are on the wire.
func chunked(chunks string) string { return post("Transfer-Encoding: chunked\r\n", chunks) }

// counted is a POST of hello with these lines that say how long it is.
func counted(fields string) string { return post(fields, "hello") }

// to is a GET of this target.
func to(target string) string { return "GET " + target + " HTTP/1.1\r\n" + host + tagged + "\r\n" }

// from is a GET with these lines in the place of Host.
func from(fields string) string { return "GET {case}/x HTTP/1.1\r\n" + fields + "\r\n" }

const end = "0\r\n\r\n"

// chunk and lengthOf count {case} right: what takes its place is as long.
func chunk(data string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(data), data) }

func lengthOf(body string) string { return fmt.Sprintf("Content-Length: %d\r\n", len(body)) }

const te = "Transfer-Encoding: chunked\r\n"

var strictTable = []oddities{
	{"Two ends of a body", []odd{
		{name: "`Content-Length` of all, beside `chunked` that ends before the rest (CL.TE)", raw: post(lengthOf(end+hidden)+te, end+hidden)},
		{name: "`chunked`, beside `Content-Length` of the first line (TE.CL)", raw: post("Content-Length: 4\r\n"+te, chunk(hidden)+end)},
		{name: "the same, `Transfer-Encoding` first", raw: post(te+"Content-Length: 4\r\n", chunk(hidden)+end)},
		{name: "`Content-Length: 0` beside `chunked`", raw: post("Content-Length: 0\r\n"+te, chunk("hello")+end)},
		{name: "`Transfer-Encoding: xchunked`", raw: post("Transfer-Encoding: xchunked\r\n"+lengthOf(end+hidden), end+hidden)},
		{name: "`Transfer-Encoding: chunked, identity`", raw: post("Transfer-Encoding: chunked, identity\r\n", end)},
		{name: "`Transfer-Encoding: identity, chunked`", raw: post("Transfer-Encoding: identity, chunked\r\n", end)},
		{name: "`Transfer-Encoding: gzip, chunked`", raw: post("Transfer-Encoding: gzip, chunked\r\n", end)},
		{name: "`Transfer-Encoding: identity`", raw: post("Transfer-Encoding: identity\r\n"+lengthOf("hello"), "hello")},
		{name: "`Transfer-Encoding: \"chunked\"`", raw: post("Transfer-Encoding: \"chunked\"\r\n", end)},
		{name: "`Transfer-Encoding: chunked,`", raw: post("Transfer-Encoding: chunked,\r\n", end)},
		{name: "`Transfer-Encoding: ,chunked`", raw: post("Transfer-Encoding: ,chunked\r\n", end)},
		{name: "`Transfer-Encoding:`, nothing in it", raw: post("Transfer-Encoding:\r\n"+lengthOf("hello"), "hello")},
		{name: "`Transfer-Encoding : chunked`", raw: post("Transfer-Encoding : chunked\r\n"+lengthOf(end+hidden), end+hidden)},
		{name: "`Transfer-Encoding<TAB>: chunked`", raw: post("Transfer-Encoding\t: chunked\r\n"+lengthOf(end+hidden), end+hidden)},
		{name: "`Transfer-Encoding:<TAB>chunked`", raw: post("Transfer-Encoding:\tchunked\r\n", chunk("hello")+end), laxer: "RFC 9110, section 5.5, allows a tab there, and the head is written anew"},
		{name: "`Transfer-Encoding: <VT>chunked`", raw: post("Transfer-Encoding: \x0bchunked\r\n"+lengthOf(end+hidden), end+hidden)},
		{name: "`Transfer-Encoding: chunked<VT>`", raw: post("Transfer-Encoding: chunked\x0b\r\n"+lengthOf(end+hidden), end+hidden)},
		{name: "`TRANSFER-ENCODING: CHUNKED`", raw: post("TRANSFER-ENCODING: CHUNKED\r\n", chunk("hello")+end)},
		{name: "`Transfer-Encoding: chunked` twice", raw: post(te+te, chunk("hello")+end)},
		{name: "`Transfer-Encoding: chunked`, then `identity`", raw: post(te+"Transfer-Encoding: identity\r\n", chunk("hello")+end)},
		{name: "`Transfer-Encoding: x`, then `chunked`", raw: post("Transfer-Encoding: x\r\n"+te, chunk("hello")+end)},
		{name: "`Transfer-Encoding` folded over two lines", raw: post("Transfer-Encoding:\r\n chunked\r\n"+lengthOf(end+hidden), end+hidden)},
		{name: "` Transfer-Encoding: chunked`, as if folded", raw: post("X: y\r\n "+te+lengthOf(end+hidden), end+hidden)},
		{name: "`X: y<LF>Transfer-Encoding: chunked`", raw: post("X: y\n"+te+lengthOf(end+hidden), end+hidden)},
		{name: "`X: y<CR>Transfer-Encoding: chunked`", raw: post("X: y\r"+te+lengthOf(end+hidden), end+hidden)},
		{name: "`<NUL>Transfer-Encoding: chunked`", raw: post("\x00"+te+lengthOf(end+hidden), end+hidden)},
		{name: "`transfer_encoding: chunked` beside `Content-Length`", raw: post("transfer_encoding: chunked\r\n"+lengthOf(end+hidden), end+hidden)},
		{name: "`chunked` in HTTP/1.0", raw: "POST {case}/x HTTP/1.0\r\n" + host + te + "\r\n" + chunk("hello") + end},
		{name: "`chunked` and `Content-Length` in HTTP/1.0", raw: "POST {case}/x HTTP/1.0\r\n" + host + te + lengthOf(end+hidden) + "Connection: keep-alive\r\n\r\n" + end + hidden},
		{name: "a body on GET, counted", raw: get(lengthOf(hidden)) + hidden},
		{name: "a body on GET, chunked", raw: get(te) + chunk(hidden) + end},
	}},
	{"Lengths", []odd{
		{name: "`Content-Length: 5` twice", raw: counted("Content-Length: 5\r\nContent-Length: 5\r\n")},
		{name: "`Content-Length: 5`, then `0`", raw: post("Content-Length: 5\r\nContent-Length: 0\r\n", "GET /")},
		{name: "`Content-Length: 5, 5`", raw: counted("Content-Length: 5, 5\r\n")},
		{name: "`Content-Length: 5, 0`", raw: counted("Content-Length: 5, 0\r\n")},
		{name: "`Content-Length: +5`", raw: counted("Content-Length: +5\r\n")},
		{name: "`Content-Length: -5`", raw: counted("Content-Length: -5\r\n")},
		{name: "`Content-Length: 05`", raw: counted("Content-Length: 05\r\n")},
		{name: "`Content-Length: 0x5`", raw: counted("Content-Length: 0x5\r\n")},
		{name: "`Content-Length: 5e0`", raw: counted("Content-Length: 5e0\r\n")},
		{name: "`Content-Length: 5 5`", raw: counted("Content-Length: 5 5\r\n")},
		{name: "`Content-Length: 5 `, a space behind it", raw: counted("Content-Length: 5 \r\n")},
		{name: "`Content-Length: 5<VT>`", raw: counted("Content-Length: 5\x0b\r\n")},
		{name: "`Content-Length:`, nothing in it", raw: counted("Content-Length:\r\n")},
		{name: "`Content-Length: 99999999999999999999`", raw: counted("Content-Length: 99999999999999999999\r\n")},
		{name: "`Content-Length : 5`", raw: counted("Content-Length : 5\r\n")},
		{name: "`Content-Length` folded over two lines", raw: counted("Content-Length:\r\n 5\r\n")},
		{name: "`content_length: 0` beside `Content-Length: 5`", raw: counted("content_length: 0\r\nContent-Length: 5\r\n")},
	}},
	{"Chunks", []odd{
		{name: "good ones, `5` and `A`", raw: chunked("5\r\nhello\r\nA\r\n0123456789\r\n" + end)},
		{name: "an extension, `5;a=b`", raw: chunked("5;a=b\r\nhello\r\n" + end)},
		{name: "an extension with a bare line feed", raw: chunked("5;a\nb\r\nhello\r\n" + end)},
		{name: "`5 `, a space behind it", raw: chunked("5 \r\nhello\r\n" + end)},
		{name: "` 5`, a space before it", raw: chunked(" 5\r\nhello\r\n" + end)},
		{name: "`5<TAB>`", raw: chunked("5\t\r\nhello\r\n" + end)},
		{name: "`0x5`", raw: chunked("0x5\r\nhello\r\n" + end)},
		{name: "`+5`", raw: chunked("+5\r\nhello\r\n" + end)},
		{name: "`-5`", raw: chunked("-5\r\nhello\r\n" + end)},
		{name: "`005`", raw: chunked("005\r\nhello\r\n" + end)},
		{name: "17 digits, `00000000000000005`", raw: chunked("00000000000000005\r\nhello\r\n" + end)},
		{name: "17 digits, `10000000000000005`, which is 5 in 64 bits", raw: chunked("10000000000000005\r\nhello\r\n" + end)},
		{name: "`ffffffffffffffff`", raw: chunked("ffffffffffffffff\r\nhello\r\n" + end)},
		{name: "`5<LF>`", raw: chunked("5\nhello\r\n" + end)},
		{name: "`5<CR>`", raw: chunked("5\rhello\r\n" + end)},
		{name: "no size", raw: chunked("\r\nhello\r\n" + end)},
		{name: "no number, `x`", raw: chunked("x\r\nhello\r\n" + end)},
		{name: "data longer than the size", raw: chunked("3\r\nhello\r\n" + end)},
		{name: "no CR LF behind the data", raw: chunked("5\r\nhello" + end)},
		{name: "a bare line feed behind the data", raw: chunked("5\r\nhello\n" + end)},
		{name: "other bytes behind the data, `5<CR><LF>helloXX`", raw: chunked("5\r\nhelloXX" + end)},
		{name: "the last chunk with an extension", raw: chunked("5\r\nhello\r\n0;a\r\n\r\n")},
		{name: "the last line ends in a bare line feed", raw: chunked("5\r\nhello\r\n0\r\n\n")},
		{name: "a trailer that nobody minds", raw: post(te+"Trailer: x-sum\r\n", "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")},
		{name: "trailer `Content-Length: 0`", raw: chunked("5\r\nhello\r\n0\r\nContent-Length: 0\r\n\r\n")},
		{name: "trailer `Transfer-Encoding: chunked`", raw: chunked("5\r\nhello\r\n0\r\n" + te + "\r\n")},
		{name: "trailer `Host: b.example`", raw: chunked("5\r\nhello\r\n0\r\nHost: b.example\r\n\r\n")},
		{name: "trailer `Authorization: x`", raw: chunked("5\r\nhello\r\n0\r\nAuthorization: x\r\n\r\n")},
		{name: "a trailer without a colon", raw: chunked("5\r\nhello\r\n0\r\nX-Sum 1\r\n\r\n")},
		{name: "a trailer that is folded", raw: chunked("5\r\nhello\r\n0\r\nX-Sum: 1\r\n 2\r\n\r\n")},
		{name: "a trailer with NUL", raw: chunked("5\r\nhello\r\n0\r\nX-Sum: \x00\r\n\r\n")},
		{name: "500 trailers", raw: chunked("5\r\nhello\r\n0\r\n" + strings.Repeat("X-Sum: 1\r\n", 500) + "\r\n")},
	}},
	{"Who sent it", []odd{
		{name: "`x-spiffe-id` of another", raw: get("x-spiffe-id: spiffe://example.org/admin\r\n")},
		{name: "`X-SPIFFE-ID` twice", raw: get("X-SPIFFE-ID: spiffe://example.org/admin\r\nX-Spiffe-Id: spiffe://example.org/admin\r\n")},
		{name: "`x-spiffe-id:`, nothing in it", raw: get("x-spiffe-id:\r\n")},
		{name: "`x_spiffe_id`", raw: get("x_spiffe_id: spiffe://example.org/admin\r\n")},
		{name: "`X-Spiffe_Id`", raw: get("X-Spiffe_Id: spiffe://example.org/admin\r\n")},
		{name: "`x-spiffe-id : …`, a space before the colon", raw: get("x-spiffe-id : spiffe://example.org/admin\r\n")},
		{name: "`x-spiffe-id` folded over two lines", raw: get("x-spiffe-id:\r\n spiffe://example.org/admin\r\n")},
		{name: "`x-spiffe-id` behind a bare CR", raw: get("X: y\rx-spiffe-id: spiffe://example.org/admin\r\n")},
		{name: "`x-spiffe-id` behind a bare LF", raw: get("X: y\nx-spiffe-id: spiffe://example.org/admin\r\n")},
		{name: "`Connection: x-spiffe-id`", raw: get("x-spiffe-id: spiffe://example.org/admin\r\nConnection: x-spiffe-id\r\n")},
		{name: "`Connection: close, x-spiffe-id`", raw: get("Connection: close, x-spiffe-id\r\n")},
		{name: "`Connection: X_Spiffe_Id`", raw: get("Connection: X_Spiffe_Id\r\n")},
		{name: "trailer `x-spiffe-id`", raw: chunked("5\r\nhello\r\n0\r\nx-spiffe-id: spiffe://example.org/admin\r\n\r\n")},
		{name: "trailer `X_Spiffe_Id`", raw: chunked("5\r\nhello\r\n0\r\nX_Spiffe_Id: spiffe://example.org/admin\r\n\r\n")},
		{name: "`x-forwarded-client-cert` of another", raw: get("x-forwarded-client-cert: URI=spiffe://example.org/admin\r\n")},
		{name: "`X_Forwarded_Client_Cert` of another", raw: get("X_Forwarded_Client_Cert: URI=spiffe://example.org/admin\r\n")},
	}},
	{"Whom it is for", []odd{
		{name: "`Host` twice, equal", raw: from(host + host)},
		{name: "`Host` twice", raw: from(host + "Host: b.example\r\n")},
		{name: "no `Host`", raw: from("")},
		{name: "no `Host`, HTTP/1.0", raw: "GET {case}/x HTTP/1.0\r\n\r\n"},
		{name: "`Host:`, nothing in it", raw: from("Host:\r\n")},
		{name: "`Host: user@a.example`", raw: from("Host: user@a.example\r\n")},
		{name: "`Host: a.example, b.example`", raw: from("Host: a.example, b.example\r\n")},
		{name: "`Host: a.example b.example`", raw: from("Host: a.example b.example\r\n")},
		{name: "`Host: a.example/x`", raw: from("Host: a.example/x\r\n")},
		{name: "`Host: a.example:80:81`", raw: from("Host: a.example:80:81\r\n")},
		{name: "`Host: a.example:x`", raw: from("Host: a.example:x\r\n")},
		{name: "`Host: a.example:99999`", raw: from("Host: a.example:99999\r\n")},
		{name: "`Host: 127.1`", raw: from("Host: 127.1\r\n")},
		{name: "`Host: [::1`", raw: from("Host: [::1\r\n")},
		{name: "`Host: A.Example`", raw: from("Host: A.Example\r\n")},
		{name: "`Host: a.example.`", raw: from("Host: a.example.\r\n")},
		{name: "`Host : a.example`", raw: from("Host : a.example\r\n")},
		{name: "`Host` folded over two lines", raw: from("Host:\r\n a.example\r\n")},
		{name: "`Host` with a NUL", raw: from("Host: a.example\x00b\r\n")},
		{name: "absolute-form, the same host", raw: to("http://a.example{case}/x")},
		{name: "absolute-form, another host", raw: to("http://b.example{case}/x")},
		{name: "absolute-form of https", raw: to("https://a.example{case}/x")},
		{name: "absolute-form with a user", raw: to("http://user@a.example{case}/x")},
		{name: "absolute-form of ftp", raw: to("ftp://a.example{case}/x")},
	}},
	{"Methods, targets and versions", []odd{
		{name: "`get`", raw: "get {case}/x HTTP/1.1\r\n" + host + "\r\n"},
		{name: "a method nobody knows, `FOO`", raw: "FOO {case}/x HTTP/1.1\r\n" + host + "\r\n"},
		{name: "a method of 200 letters", raw: strings.Repeat("M", 200) + " {case}/x HTTP/1.1\r\n" + host + "\r\n"},
		{name: "a method with a NUL", raw: "GE\x00T {case}/x HTTP/1.1\r\n" + host + "\r\n"},
		{name: "`CONNECT a.example:443`", raw: "CONNECT a.example:443 HTTP/1.1\r\n" + host + tagged + "\r\n"},
		{name: "`TRACE`", raw: "TRACE {case}/x HTTP/1.1\r\n" + host + "\r\n", ends: true},
		{name: "`TRACE` with a body", raw: "TRACE {case}/x HTTP/1.1\r\n" + host + "Content-Length: 5\r\n\r\nhello"},
		{name: "`OPTIONS *`", raw: "OPTIONS * HTTP/1.1\r\n" + host + tagged + "\r\n", laxer: "it asks about the server as a whole (RFC 9110, section 9.3.7); rules see the path `*`"},
		{name: "`GET *`", raw: "GET * HTTP/1.1\r\n" + host + tagged + "\r\n"},
		{name: "a target without a slash, `x`", raw: to("x")},
		{name: "a space in the target", raw: to("{case}/x y")},
		{name: "two spaces before the version", raw: to("{case}/x ")},
		{name: "tabs for spaces", raw: "GET\t{case}/x\tHTTP/1.1\r\n" + host + "\r\n"},
		{name: "`/x#fragment`", raw: to("{case}/x#fragment")},
		{name: "`//x`", raw: to("{case}//x")},
		{name: "`/y/../x`", raw: to("{case}/y/../x")},
		{name: "`/y/./x`", raw: to("{case}/y/./x")},
		{name: "`/y/%2e%2e/x`", raw: to("{case}/y/%2e%2e/x")},
		{name: "`/y/%2E%2E%2Fx`", raw: to("{case}/y/%2E%2E%2Fx")},
		{name: "`/y%2fx`", raw: to("{case}/y%2fx")},
		{name: "`/y%5cx`", raw: to("{case}/y%5cx")},
		{name: "`/y\\x`", raw: to("{case}/y\\x")},
		{name: "`/x;y=z`", raw: to("{case}/x;y=z")},
		{name: "`/x%00`", raw: to("{case}/x%00")},
		{name: "`/x%0d%0aX:y`", raw: to("{case}/x%0d%0aX:y")},
		{name: "`/x%zz`", raw: to("{case}/x%zz")},
		{name: "`/x%`", raw: to("{case}/x%")},
		{name: "`/%252e%252e/x`", raw: to("{case}/%252e%252e/x")},
		{name: "`/%c0%ae%c0%ae/x`", raw: to("{case}/%c0%ae%c0%ae/x")},
		{name: "`/x` with a raw byte 0xe9", raw: to("{case}/x\xe9")},
		{name: "`/x` with a NUL", raw: to("{case}/x\x00y")},
		{name: "`/x?a=b c`", raw: to("{case}/x?a=b c")},
		{name: "`/%78`, which is `/x`", raw: to("{case}/%78")},
		{name: "a target of 9,000 bytes", raw: to("{case}/" + strings.Repeat("x", 9000))},
		{name: "HTTP/0.9", raw: "GET {case}/x\r\n"},
		{name: "HTTP/1.2", raw: "GET {case}/x HTTP/1.2\r\n" + host + "\r\n"},
		{name: "HTTP/1.10", raw: "GET {case}/x HTTP/1.10\r\n" + host + "\r\n"},
		{name: "HTTP/2.0", raw: "GET {case}/x HTTP/2.0\r\n" + host + "\r\n"},
		{name: "the preface of HTTP/2", raw: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
		{name: "`http/1.1`", raw: "GET {case}/x http/1.1\r\n" + host + "\r\n"},
		{name: "a space behind the version", raw: "GET {case}/x HTTP/1.1 \r\n" + host + "\r\n"},
	}},
	{"Lines and fields", []odd{
		{name: "an empty line before the request", raw: "\r\n" + get("")},
		{name: "ten empty lines before the request", raw: strings.Repeat("\r\n", 10) + get("")},
		{name: "lines that end in LF", raw: "GET {case}/x HTTP/1.1\nHost: a.example\n\n"},
		{name: "the last line ends in LF", raw: "GET {case}/x HTTP/1.1\r\n" + host + "\n"},
		{name: "a field that is folded", raw: get("X: y\r\n z\r\n")},
		{name: "a fold before the first field", raw: "GET {case}/x HTTP/1.1\r\n X: y\r\n" + host + "\r\n"},
		{name: "a CR in a value", raw: get("X: y\rz\r\n")},
		{name: "a NUL in a value", raw: get("X: y\x00z\r\n")},
		{name: "a NUL in a name", raw: get("X\x00: y\r\n")},
		{name: "a control character in a value", raw: get("X: y\x01z\r\n")},
		{name: "bytes above 0x7f in a value", raw: get("X: caf\xc3\xa9\r\n")},
		{name: "bytes above 0x7f in a name", raw: get("X\xc3\xa9: y\r\n")},
		{name: "a space in a name", raw: get("X Y: z\r\n")},
		{name: "a space before the colon", raw: get("X : y\r\n")},
		{name: "a line without a colon", raw: get("X\r\n")},
		{name: "a line without a name", raw: get(": y\r\n")},
		{name: "a field of 70,000 bytes", raw: get("X: " + strings.Repeat("y", 70_000) + "\r\n")},
		{name: "fields of 100,000 bytes", raw: get(strings.Repeat("X: "+strings.Repeat("y", 995)+"\r\n", 100))},
		{name: "1,000 fields", raw: get(strings.Repeat("X: y\r\n", 1000))},
	}},
	{"Expectations and upgrades", []odd{
		{name: "`Expect: 100-continue`", raw: counted("Expect: 100-continue\r\nContent-Length: 5\r\n")},
		{name: "`Expect: 100-continue` without a body", raw: get("Expect: 100-continue\r\n")},
		{name: "`Expect: 100-continue` in HTTP/1.0", raw: "POST {case}/x HTTP/1.0\r\n" + host + "Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello"},
		{name: "`Expect: 100-continue` twice", raw: counted("Expect: 100-continue\r\nExpect: 100-continue\r\nContent-Length: 5\r\n")},
		{name: "`Expect: 100-continue, x`", raw: counted("Expect: 100-continue, x\r\nContent-Length: 5\r\n")},
		{name: "`Expect: x`", raw: counted("Expect: x\r\nContent-Length: 5\r\n")},
		{name: "`Upgrade: websocket` with a body", raw: counted("Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n")},
		{name: "`Upgrade: websocket` that `Connection` does not list", raw: get("Upgrade: websocket\r\n")},
		{name: "`Upgrade: h2c`", raw: get("Connection: upgrade, http2-settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n")},
		{name: "`Upgrade: websocket, h2c`", raw: get("Connection: upgrade\r\nUpgrade: websocket, h2c\r\n"), laxer: "a list is no offer: it is taken away, and the request goes on without"},
		{name: "`Connection: content-length`", raw: counted("Connection: content-length\r\nContent-Length: 5\r\n")},
		{name: "`Connection: transfer-encoding`", raw: post("Connection: transfer-encoding\r\n"+te, chunk("hello")+end)},
		{name: "`Connection: host`", raw: get("Connection: host\r\n")},
		{name: "`Connection: authorization`", raw: get("Connection: authorization\r\nAuthorization: x\r\n")},
		{name: "`Connection: x y`", raw: get("Connection: x y\r\n")},
		{name: "`Connection` with 1,000 options", raw: get("Connection: " + strings.Repeat("x, ", 1000) + "\r\n")},
	}},
}
