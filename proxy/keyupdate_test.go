package proxy

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// rekeyer writes records of TLS_AES_128_GCM_SHA256 by itself, because
// crypto/tls has no way to ask for a KeyUpdate (RFC 8446 §4.6.3).
type rekeyer struct {
	to     net.Conn
	secret []byte
	seq    uint64
}

// newRekeyer takes the writing half of c over after its handshake, of whose
// keys log is the log.
func newRekeyer(t *testing.T, c *tls.Conn, log string) *rekeyer {
	t.Helper()
	cs := c.ConnectionState()
	if cs.Version != tls.VersionTLS13 || cs.CipherSuite != tls.TLS_AES_128_GCM_SHA256 {
		t.Skipf("this machine prefers %s", tls.CipherSuiteName(cs.CipherSuite))
	}
	for line := range strings.Lines(log) {
		if words := strings.Fields(line); words[0] == "CLIENT_TRAFFIC_SECRET_0" {
			secret, err := hex.DecodeString(words[2])
			if err != nil {
				t.Fatal(err)
			}
			return &rekeyer{to: c.NetConn(), secret: secret}
		}
	}
	t.Fatal("the log of the keys has no traffic secret")
	return nil
}

// expand is HKDF-Expand-Label (RFC 8446 §7.1) without a context.
func (r *rekeyer) expand(label string, size int) []byte {
	label = "tls13 " + label
	info := binary.BigEndian.AppendUint16(nil, uint16(size))
	info = append(info, byte(len(label)))
	info = append(append(info, label...), 0)
	out, err := hkdf.Expand(sha256.New, r.secret, string(info), size)
	if err != nil {
		panic(err)
	}
	return out
}

// record is one of a content type, protected (RFC 8446 §5.2).
func (r *rekeyer) record(kind byte, content ...byte) []byte {
	b, err := aes.NewCipher(r.expand("key", 16))
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCM(b)
	if err != nil {
		panic(err)
	}
	nonce := r.expand("iv", 12)
	var seq [12]byte
	binary.BigEndian.PutUint64(seq[4:], r.seq)
	for i := range nonce {
		nonce[i] ^= seq[i]
	}
	r.seq++
	plain := append(content, kind)
	head := binary.BigEndian.AppendUint16([]byte{23, 3, 3}, uint16(len(plain)+aead.Overhead()))
	return aead.Seal(head, nonce, plain, head)
}

// rekey asks the far end to change its keys too, and says something.
func (r *rekeyer) rekey() error {
	const keyUpdate, updateRequested = 24, 1
	b := r.record(22, keyUpdate, 0, 0, 1, updateRequested)
	r.secret, r.seq = r.expand("traffic upd", sha256.Size), 0
	_, err := r.to.Write(append(b, r.record(23, '.')...))
	return err
}

// A peer that asks for new keys again and again while it is sent a lot: what is
// answered is written by the stream that reads, in between what the other one
// writes.
func TestKeyUpdatesWhileSending(t *testing.T) {
	t.Parallel()
	const size = 16 << 20
	text := bytes.Repeat([]byte("0123456789abcde\n"), 64<<10/16)
	answered := make(chan struct{}, 1) // one at a time: crypto/tls takes 16 in a row without data
	p, cc := parkingProxy(t, func(c net.Conn) {
		var reading sync.WaitGroup
		reading.Go(func() {
			said := make([]byte, 1)
			for {
				if _, err := c.Read(said); err != nil {
					return
				}
				select {
				case <-answered:
				default:
				}
			}
		})
		for n := 0; n < size; n += len(text) {
			if _, err := c.Write(text); err != nil {
				break
			}
		}
		reading.Wait() // crypto/tls cannot answer after its close_notify
	})
	var log bytes.Buffer
	cc.KeyLogWriter = &log
	c := dialTLS(t, p.addr("orders"), cc)
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	r := newRekeyer(t, c, log.String())
	turns, over, asked := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		for range turns {
			select {
			case answered <- struct{}{}:
			case <-over:
				asked <- nil
				return
			}
			if err := r.rekey(); err != nil {
				asked <- fmt.Errorf("ask for new keys: %w", err)
				return
			}
		}
		asked <- nil
	}()
	got := make([]byte, len(text))
	for n := 0; n < size; n += len(text) {
		if _, err := io.ReadFull(c, got); err != nil {
			t.Errorf("after %d bytes: %v", n, err)
			break
		}
		if !bytes.Equal(got, text) {
			t.Errorf("after %d bytes: others than were sent", n)
			break
		}
		select {
		case turns <- struct{}{}:
		default:
		}
	}
	close(over)
	close(turns)
	if err := <-asked; err != nil && !t.Failed() {
		t.Error(err)
	}
	_ = c.Close()
}

// A target that has said all it has to say can still be sent to, also by a
// peer that asks for new keys.
func TestKeyUpdateAfterHalfClose(t *testing.T) {
	t.Parallel()
	heard := make(chan string, 1)
	p, cc := parkingProxy(t, func(c net.Conn) {
		_ = c.(*net.TCPConn).CloseWrite()
		all, err := io.ReadAll(c)
		if err != nil {
			t.Errorf("the target: %v", err)
		}
		heard <- string(all)
	})
	var log bytes.Buffer
	cc.KeyLogWriter = &log
	c := dialTLS(t, p.addr("orders"), cc)
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF { //nolint:errorlint // Read says so itself
		t.Fatalf("read %d, %v", n, err)
	}
	r := newRekeyer(t, c, log.String())
	for range 3 {
		if err := r.rekey(); err != nil {
			t.Fatal(err)
		}
	}
	const closeNotify = 0
	if _, err := c.NetConn().Write(r.record(21, 1, closeNotify)); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-heard:
		if got != "..." {
			t.Errorf("the target heard %q", got)
		}
	case <-time.After(patience):
		t.Error("the target hears no end")
	}
}
