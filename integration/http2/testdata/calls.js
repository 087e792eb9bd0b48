// Calls of gRPC in Node: calls.js ADDRESS [CERT KEY CA]. It prints ok when all
// ended as they should.
'use strict'
const assert = require('assert')
const fs = require('fs')
const grpc = require('@grpc/grpc-js')
const [, , address, cert, key, ca] = process.argv

const credentials = cert
  ? grpc.credentials.createSsl(fs.readFileSync(ca), fs.readFileSync(key), fs.readFileSync(cert))
  : grpc.credentials.createInsecure()
const client = new grpc.Client(address, credentials, { 'grpc.enable_http_proxy': 0 })
const same = b => b

const unary = (message, metadata, options) => new Promise((resolve, reject) => {
  let head, tail
  const call = client.makeUnaryRequest('/test.Calls/Unary', same, same, message, metadata, options, (err, answer) => {
    if (err) reject(err)
    else setImmediate(() => resolve({ answer, head, tail }))
  })
  call.on('metadata', m => { head = m })
  call.on('status', s => { tail = s.metadata })
})

// ended resolves with how a call ended.
const ended = call => new Promise(resolve => {
  call.on('error', () => {})
  call.on('status', resolve)
})

const bidi = (method, options) => client.makeBidiStreamRequest('/test.Calls/' + method, same, same, new grpc.Metadata(), options)
const next = call => new Promise(resolve => call.once('data', resolve))

async function main () {
  for (const size of [0, 1, 65536, 3 << 20]) {
    const said = new grpc.Metadata()
    said.set('x-say', 'hello')
    said.set('x-say-bin', Buffer.from([0, 255, 128]))
    const { answer, head, tail } = await unary(Buffer.alloc(size, 'x'), said, {})
    assert.strictEqual(answer.length, size)
    for (const m of [head, tail]) {
      assert.deepStrictEqual(m.get('x-say'), ['hello'])
      assert.deepStrictEqual(m.get('x-say-bin'), [Buffer.from([0, 255, 128])])
    }
  }
  const many = await Promise.all(Array.from({ length: 50 }, (_, i) => unary(Buffer.from('call ' + i), new grpc.Metadata(), {})))
  many.forEach(({ answer }, i) => assert.strictEqual(String(answer), 'call ' + i))

  const talk = bidi('Stream')
  for (let i = 0; i < 100; i++) {
    const got = next(talk)
    talk.write(Buffer.from('message ' + i))
    assert.strictEqual(String(await got), 'message ' + i)
  }
  let status = ended(talk)
  talk.on('data', () => {})
  talk.end()
  assert.strictEqual((await status).code, grpc.status.OK)

  const failing = bidi('Failing')
  status = ended(failing)
  failing.on('data', () => {})
  failing.write(Buffer.from('hello'))
  const { code, details } = await status
  assert.deepStrictEqual([code, details], [grpc.status.FAILED_PRECONDITION, 'not today: 100% ☃\n'])

  const late = bidi('Holding', { deadline: Date.now() + 1000 })
  status = ended(late)
  late.on('data', () => {})
  late.write(Buffer.from('hello'))
  assert.strictEqual((await status).code, grpc.status.DEADLINE_EXCEEDED)

  const left = bidi('Holding')
  status = ended(left)
  left.write(Buffer.from('hello'))
  await next(left)
  left.cancel()
  assert.strictEqual((await status).code, grpc.status.CANCELLED)

  client.close()
  console.log('ok')
}
main()
