// A service of HTTP/2 in Node, with prior knowledge, or by mutual TLS:
// server.js PORT [CERT KEY CA]. It gives out bytes of a pattern, keeps what it
// is given, answers what it was sent together with trailers, hints at what it
// is going to say, and gives back what WebSockets send.
'use strict'
const crypto = require('crypto')
const fs = require('fs')
const http2 = require('http2')
const [, , port, cert, key, ca] = process.argv
const settings = { enableConnectProtocol: true }
const maxSessionMemory = 256 // MB; with 10, many large answers at a time are too much for it
const store = new Map()

function pattern (size) {
  const b = Buffer.alloc(size)
  for (let i = 0; i < size; i++) b[i] = i % 251
  return b
}

function whole (stream, then) {
  const parts = []
  stream.on('data', part => parts.push(part))
  stream.on('end', () => then(Buffer.concat(parts)))
}

// frames gives back each frame of a WebSocket without its mask (RFC 6455,
// section 5.2), and ends when it is asked to close.
function frames (stream) {
  let rest = Buffer.alloc(0)
  stream.on('data', part => {
    rest = Buffer.concat([rest, part])
    for (;;) {
      if (rest.length < 2) return
      let size = rest[1] & 127
      let at = 2
      if (size === 126) { if (rest.length < 4) return; size = rest.readUInt16BE(2); at = 4 }
      if (size === 127) { if (rest.length < 10) return; size = Number(rest.readBigUInt64BE(2)); at = 10 }
      if (rest.length < at + 4 + size) return
      const mask = rest.subarray(at, at + 4)
      const data = Buffer.from(rest.subarray(at + 4, at + 4 + size))
      for (let i = 0; i < size; i++) data[i] ^= mask[i & 3]
      const kind = (rest[0] & 15) === 9 ? (rest[0] & 240) | 10 : rest[0] // a ping is answered
      stream.write(Buffer.concat([Buffer.from([kind]), Buffer.from([rest[1] & 127]), rest.subarray(2, at), data]))
      if ((rest[0] & 15) === 8) stream.end()
      rest = rest.subarray(at + 4 + size)
    }
  })
}

function serve (stream, headers) {
  const path = headers[':path'].split('/')
  stream.on('error', () => {})
  if (headers[':method'] === 'CONNECT') {
    stream.respond({ ':status': headers[':protocol'] === 'websocket' ? 200 : 501 })
    frames(stream)
  } else if (path[1] === 'bytes') {
    whole(stream, () => {
      const b = pattern(Number(path[2]))
      stream.respond({ ':status': 200, 'content-length': b.length })
      stream.end(headers[':method'] === 'HEAD' ? undefined : b)
    })
  } else if (path[1] === 'store' && headers[':method'] === 'PUT') {
    whole(stream, b => { store.set(headers[':path'], b); stream.respond({ ':status': 201 }, { endStream: true }) })
  } else if (path[1] === 'store' && store.has(headers[':path'])) {
    stream.respond({ ':status': 200 })
    stream.end(store.get(headers[':path']))
  } else if (path[1] === 'echo') {
    stream.respond({ ':status': 200 }, { waitForTrailers: true })
    const sum = crypto.createHash('sha256')
    let sent = ''
    stream.on('trailers', t => { sent = t['x-sent'] })
    stream.on('data', part => { sum.update(part); stream.write(part) })
    stream.on('end', () => stream.end())
    stream.on('wantTrailers', () => stream.sendTrailers({ 'x-sum': sum.digest('hex'), 'x-got': sent }))
  } else if (path[1] === 'hints') {
    stream.additionalHeaders({ ':status': 103, link: '</style.css>; rel=preload' })
    stream.respond({ ':status': 200 })
    stream.end('ok\n')
  } else {
    stream.respond({ ':status': 404 }, { endStream: true })
  }
}

const server = cert
  ? http2.createSecureServer({ settings, maxSessionMemory, cert: fs.readFileSync(cert), key: fs.readFileSync(key), ca: fs.readFileSync(ca), requestCert: true })
  : http2.createServer({ settings, maxSessionMemory })
server.on('stream', serve)
server.listen(Number(port), '127.0.0.1')
