// A service in Node: server.js PORT. It gives out bytes of a pattern, keeps
// what it is given, answers what it was sent together with trailers, and hints
// at what it is going to say.
'use strict'
const http = require('http')
const crypto = require('crypto')

const store = new Map()

function pattern (size) {
  const b = Buffer.alloc(size)
  for (let i = 0; i < size; i++) b[i] = i % 251
  return b
}

function whole (req, then) {
  const parts = []
  req.on('data', part => parts.push(part))
  req.on('end', () => then(Buffer.concat(parts)))
}

const server = http.createServer((req, res) => {
  const path = req.url.split('/')
  if (path[1] === 'bytes') {
    whole(req, () => {
      const b = pattern(Number(path[2]))
      res.writeHead(200, { 'Content-Length': b.length })
      res.end(b)
    })
  } else if (path[1] === 'store' && req.method === 'PUT') {
    whole(req, b => { store.set(req.url, b); res.writeHead(201, { 'Content-Length': 0 }); res.end() })
  } else if (path[1] === 'store' && store.has(req.url)) {
    res.writeHead(200, { 'Content-Length': store.get(req.url).length })
    res.end(store.get(req.url))
  } else if (path[1] === 'echo') {
    res.writeHead(200, { Trailer: 'X-Sum, X-Got' })
    const sum = crypto.createHash('sha256')
    req.on('data', part => { sum.update(part); res.write(part) })
    req.on('end', () => {
      res.addTrailers({ 'X-Sum': sum.digest('hex'), 'X-Got': req.trailers['x-sent'] || '' })
      res.end()
    })
  } else if (path[1] === 'hints') {
    res.writeEarlyHints({ link: '</style.css>; rel=preload' })
    res.end('ok\n')
  } else {
    res.writeHead(404)
    res.end()
  }
})
server.listen(Number(process.argv[2]), '127.0.0.1')
