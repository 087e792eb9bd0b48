package mesh

import (
	"fmt"
	"io"
	"net/http"
	"strings"
)

// Answer is a response that was read to its end.
type Answer struct {
	Status int
	Header http.Header
	Length int64 // that it says it has
	Last   bool  // the connection closes behind it
	Body   string
}

// Fetch makes a request and reads all of its answer.
func Fetch(client *http.Client, method, url string, body io.Reader, fields ...string) (Answer, error) {
	req, err := http.NewRequest(method, url, body)
	if err != nil {
		return Answer{}, err
	}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		req.Header.Add(name, value)
	}
	if host := req.Header.Get("Host"); host != "" {
		req.Host = host
	}
	resp, err := client.Do(req)
	if err != nil {
		return Answer{}, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return Answer{resp.StatusCode, resp.Header, resp.ContentLength, resp.Close, string(data)}, err
}

// FetchOK wants 200 and returns the body.
func FetchOK(client *http.Client, url string) (body string, err error) {
	a, err := Fetch(client, http.MethodGet, url, nil)
	if err == nil && a.Status != http.StatusOK {
		err = fmt.Errorf("%s: %d %.200q", url, a.Status, a.Body)
	}
	return a.Body, err
}
