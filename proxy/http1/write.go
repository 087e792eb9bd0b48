package http1

import (
	"net/http"
	"strconv"
)

// Edit says what is different in a head that is passed on. The zero value
// changes nothing but what is of one connection alone: fields marked Hop go,
// the framing is written anew from what was understood of it, and the host is
// the canonical one.
type Edit struct {
	Drop   *Names  // these go, in every spelling
	Set    []Field // these take the place of all of their name, in every spelling; at most a few
	Append []Field // these come behind all others; after Drop and Set, and not held against them

	Host string // of a request: in place of its own; empty keeps that

	Close     bool   // the connection closes after this message
	Persist   bool   // connection: keep-alive is written, for a client of HTTP/1.0
	Upgrade   string // the protocol that is asked for or taken; goes before Close
	Unchunked bool   // of a response: a chunked body is written without chunks, until the connection closes
}

// Append appends the head as it goes to a service. It does not allocate where
// dst has room. What an Edit brings is written as it is: names in lower case
// and values that [canonical.HeaderValue] takes.
func (r *Request) Append(dst []byte, e *Edit) []byte {
	dst = append(append(dst, r.Method...), ' ')
	dst = append(dst, r.Target.Path...)
	if r.Target.HasQuery {
		dst = append(append(dst, '?'), r.Target.Query...)
	}
	dst = append(dst, " HTTP/1.1\r\nhost: "...)
	if e.Host != "" {
		dst = append(dst, e.Host...)
	} else {
		dst = append(dst, r.Host...)
	}
	dst = append(dst, "\r\n"...)
	for i := range r.Fields {
		if f := &r.Fields[i]; f.Name != "host" && e.keeps(f) {
			dst = appendField(dst, f)
		}
	}
	switch {
	case r.Body == Chunked:
		dst = append(dst, "transfer-encoding: chunked\r\n"...)
	case r.head.length >= 0: // also 0, which says that there is no body to wait for
		dst = appendLength(dst, r.head.length)
	}
	return e.finish(dst)
}

// Append appends the head as it goes to a client, as [Request.Append] does.
func (r *Response) Append(dst []byte, e *Edit) []byte {
	dst = append(dst, "HTTP/1.1 "...)
	dst = append(strconv.AppendInt(dst, int64(r.Status), 10), ' ')
	dst = append(append(dst, r.Phrase...), "\r\n"...)
	for i := range r.Fields {
		if f := &r.Fields[i]; e.keeps(f) {
			dst = appendField(dst, f)
		}
	}
	unchunked := e.Unchunked && r.Body == Chunked
	switch {
	case r.head.chunked && !unchunked: // of HEAD and 304 too: it says what GET would bring
		dst = append(dst, "transfer-encoding: chunked\r\n"...)
	case r.Length >= 0:
		dst = appendLength(dst, r.Length)
	case r.head.ended:
		dst = appendLength(dst, 0)
	}
	if unchunked || r.Body == UntilClose {
		closing := *e
		closing.Close = true
		return closing.finish(dst)
	}
	return e.finish(dst)
}

// keeps reports whether a field is passed on.
func (e *Edit) keeps(f *Field) bool {
	if f.Hop || e.Drop.Has(f.Name) {
		return false
	}
	for i := range e.Set {
		if sameName(e.Set[i].Name, f.Name) {
			return false
		}
	}
	return true
}

// finish appends what the edit adds, and the empty line.
func (e *Edit) finish(dst []byte) []byte {
	for i := range e.Set {
		dst = appendField(dst, &e.Set[i])
	}
	for i := range e.Append {
		dst = appendField(dst, &e.Append[i])
	}
	switch {
	case e.Upgrade != "":
		dst = append(append(dst, "connection: upgrade\r\nupgrade: "...), e.Upgrade...)
		dst = append(dst, "\r\n"...)
	case e.Close:
		dst = append(dst, "connection: close\r\n"...)
	case e.Persist:
		dst = append(dst, "connection: keep-alive\r\n"...)
	}
	return append(dst, "\r\n"...)
}

func appendField(dst []byte, f *Field) []byte {
	dst = append(append(dst, f.Name...), ": "...)
	return append(append(dst, f.Value...), "\r\n"...)
}

func appendLength(dst []byte, n int64) []byte {
	dst = strconv.AppendInt(append(dst, "content-length: "...), n, 10)
	return append(dst, "\r\n"...)
}

// maxRequestID bounds what AppendAnswer takes for one, in bytes.
const maxRequestID = 128

// Answer is a whole response of our own: a status, and the request's id, by
// which whoever reads the log finds why.
type Answer struct {
	Status int
	ID     string  // left out where it is empty, longer than 128 bytes or not of visible ASCII
	Fields []Field // written as they are, as those of an [Edit]
	Head   bool    // the request was HEAD, whose answer has no body
	Close  bool    // the connection closes after it
}

// AppendAnswer appends a to dst.
func AppendAnswer(dst []byte, a *Answer) []byte {
	phrase := http.StatusText(a.Status)
	dst = appendStatus(append(dst, "HTTP/1.1 "...), a.Status, phrase)
	dst = append(dst, "\r\ncontent-type: "...)
	dst = append(append(dst, answerType...), "\r\n"...)
	dst = appendLength(dst, int64(a.size()))
	if id := a.id(); id != "" {
		dst = appendField(dst, &Field{Name: "x-request-id", Value: id})
	}
	for i := range a.Fields {
		dst = appendField(dst, &a.Fields[i])
	}
	if a.Close {
		dst = append(dst, "connection: close\r\n"...)
	}
	dst = append(dst, "\r\n"...)
	if a.Head {
		return dst
	}
	return a.appendBody(dst)
}

// AnswerParts returns the same for HTTP/2: its fields, and its content.
func AnswerParts(a *Answer) ([]Field, []byte) {
	fields := append(make([]Field, 0, len(a.Fields)+3), Field{Name: "content-type", Value: answerType}, Field{Name: "content-length", Value: strconv.Itoa(a.size())})
	if id := a.id(); id != "" {
		fields = append(fields, Field{Name: "x-request-id", Value: id})
	}
	return append(fields, a.Fields...), a.appendBody(nil)
}

const answerType = "text/plain; charset=utf-8"

func (a *Answer) id() string {
	if !isRequestID(a.ID) {
		return ""
	}
	return a.ID
}

func (a *Answer) size() int {
	size := len("000 ") + len(http.StatusText(a.Status)) + len("\n")
	if id := a.id(); id != "" {
		size += len("request ") + len(id) + len("\n")
	}
	return size
}

func (a *Answer) appendBody(dst []byte) []byte {
	dst = append(appendStatus(dst, a.Status, http.StatusText(a.Status)), '\n')
	if id := a.id(); id != "" {
		dst = append(append(append(dst, "request "...), id...), '\n')
	}
	return dst
}

func appendStatus(dst []byte, status int, phrase string) []byte {
	dst = append(strconv.AppendInt(dst, int64(status), 10), ' ')
	return append(dst, phrase...)
}

func isRequestID(id string) bool {
	for i := range len(id) {
		if id[i] <= ' ' || id[i] > '~' {
			return false
		}
	}
	return id != "" && len(id) <= maxRequestID
}
