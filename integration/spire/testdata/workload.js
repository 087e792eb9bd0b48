// A workload in Node: workload.js PROTO SOCKET TRUST_DOMAIN. It asks for all that
// the SPIFFE Workload API has, and verifies what it is given with Node's own
// cryptography. It prints ok when all was as it should be.
'use strict'
const assert = require('assert')
const crypto = require('crypto')
const path = require('path')
const grpc = require('@grpc/grpc-js')
const loader = require('@grpc/proto-loader')
const [, , proto, socket, trustDomain] = process.argv

const domain = `spiffe://${trustDomain}`
const known = loader.loadSync(proto, { includeDirs: [path.dirname(proto)], keepCase: true, defaults: true })
const { SpiffeWorkloadAPI } = grpc.loadPackageDefinition(known)
const client = new SpiffeWorkloadAPI(`unix:${socket}`, grpc.credentials.createInsecure())

const streams = ['FetchX509SVID', 'FetchX509Bundles', 'FetchJWTBundles', 'FetchWITSVID', 'FetchWITBundles']
const withHeader = values => {
  const metadata = new grpc.Metadata()
  values.forEach(v => metadata.add('workload.spiffe.io', v))
  return metadata
}

// ask resolves with the answer, of a stream with the first one.
const ask = (method, request, header = ['true']) => new Promise((resolve, reject) => {
  const options = { deadline: Date.now() + 20000 }
  if (streams.includes(method)) {
    const call = client[method](request, withHeader(header), options)
    call.once('data', answer => { resolve(answer); call.cancel() })
    call.on('error', reject) // Canceled too, after it has been resolved
  } else {
    client[method](request, withHeader(header), options, (err, answer) => err ? reject(err) : resolve(answer))
  }
})
const refused = async (code, says, ...call) => {
  const answer = await ask(...call).then(() => null, err => err)
  assert.ok(answer && answer.code === code && answer.details.includes(says), `${call[0]}: ${answer}`)
}

// certificates splits DER certificates that follow one another.
function certificates (der) {
  const found = []
  while (der.length > 0) {
    assert.strictEqual(der[0], 0x30)
    assert.strictEqual(der[1], 0x82) // two bytes of length, as every certificate has
    const size = 4 + der.readUInt16BE(2)
    found.push(new crypto.X509Certificate(der.subarray(0, size)))
    der = der.subarray(size)
  }
  return found
}

const decode = part => JSON.parse(Buffer.from(part, 'base64url'))

// verified returns the header and the claims of a token that a key of the JWK
// Set has signed with ES256.
function verified (token, jwks) {
  const [head, claims, signature] = token.split('.')
  const header = decode(head)
  const jwk = JSON.parse(jwks).keys.find(k => k.kid === header.kid)
  assert.strictEqual(header.alg, 'ES256')
  const key = { key: crypto.createPublicKey({ key: jwk, format: 'jwk' }), dsaEncoding: 'ieee-p1363' }
  assert.ok(crypto.verify('sha256', `${head}.${claims}`, key, Buffer.from(signature, 'base64url')))
  return { header, claims: decode(claims) }
}

async function header () {
  const requests = { FetchJWTSVID: { audience: ['db'] }, ValidateJWTSVID: { audience: 'db', svid: 'x' } }
  for (const method of Object.keys(SpiffeWorkloadAPI.service)) {
    for (const values of [[], ['True'], ['true', 'true']]) {
      await refused(grpc.status.INVALID_ARGUMENT, 'workload.spiffe.io', method, requests[method] || {}, values)
    }
  }
}

async function x509 () {
  const { svids, federated_bundles: foreign } = await ask('FetchX509SVID', {})
  const { bundles } = await ask('FetchX509Bundles', {})
  assert.deepStrictEqual(svids.map(s => s.spiffe_id).sort(), [`${domain}/admin`, `${domain}/web`])
  assert.deepStrictEqual(Object.keys(foreign), [])
  assert.deepStrictEqual(Object.keys(bundles), [domain])
  for (const svid of svids) {
    assert.strictEqual(svid.hint, svid.spiffe_id.endsWith('/web') ? 'internal' : '')
    assert.deepStrictEqual(svid.bundle, bundles[domain])
    const leaf = certificates(svid.x509_svid)[0]
    assert.strictEqual(leaf.ca, false)
    assert.strictEqual(leaf.subjectAltName, `URI:${svid.spiffe_id}`)
    assert.ok(leaf.checkPrivateKey(crypto.createPrivateKey({ key: svid.x509_svid_key, format: 'der', type: 'pkcs8' })))
    assert.ok(certificates(svid.bundle).some(ca => ca.ca && leaf.checkIssued(ca) && leaf.verify(ca.publicKey)))
  }
}

async function jwt () {
  const { bundles } = await ask('FetchJWTBundles', {})
  const { svids } = await ask('FetchJWTSVID', { audience: ['db', 'queue'] })
  assert.strictEqual(svids.length, 2)
  for (const svid of svids) {
    const { claims } = verified(svid.svid, bundles[domain])
    assert.strictEqual(claims.sub, svid.spiffe_id)
    assert.deepStrictEqual([...claims.aud].sort(), ['db', 'queue'])
    const valid = await ask('ValidateJWTSVID', { audience: 'queue', svid: svid.svid })
    assert.strictEqual(valid.spiffe_id, svid.spiffe_id)
    assert.strictEqual(valid.claims.fields.exp.numberValue, claims.exp)
  }
  const one = await ask('FetchJWTSVID', { audience: ['db'], spiffe_id: `${domain}/web` })
  assert.deepStrictEqual(one.svids.map(s => s.spiffe_id + s.hint), [`${domain}/webinternal`])
  await refused(grpc.status.INVALID_ARGUMENT, 'audience', 'FetchJWTSVID', {})
  await refused(grpc.status.PERMISSION_DENIED, 'not entitled', 'FetchJWTSVID', { audience: ['db'], spiffe_id: `${domain}/other` })
  const token = one.svids[0].svid
  await refused(grpc.status.INVALID_ARGUMENT, 'none of its audiences', 'ValidateJWTSVID', { audience: 'bank', svid: token })
  const [head, , signature] = token.split('.')
  const forged = Buffer.from(JSON.stringify({ sub: `${domain}/other`, aud: ['db'], exp: 9999999999 })).toString('base64url')
  await refused(grpc.status.INVALID_ARGUMENT, 'signature', 'ValidateJWTSVID', { audience: 'db', svid: `${head}.${forged}.${signature}` })
}

async function wit () {
  const { bundles } = await ask('FetchWITBundles', {})
  const { svids } = await ask('FetchWITSVID', {})
  assert.strictEqual(svids.length, 2)
  for (const svid of svids) {
    const { header, claims } = verified(svid.wit_svid, bundles[domain])
    const { d, kty, crv, x, y } = JSON.parse(svid.wit_svid_key)
    assert.strictEqual(header.typ, 'wit+jwt')
    assert.strictEqual(claims.sub, svid.spiffe_id)
    assert.strictEqual(claims.aud, undefined)
    assert.strictEqual(claims.cnf.jwk.alg, 'ES256')
    for (const [name, value] of Object.entries({ kty, crv, x, y })) assert.strictEqual(claims.cnf.jwk[name], value)
    assert.ok(d)
    await refused(grpc.status.INVALID_ARGUMENT, 'typ', 'ValidateJWTSVID', { audience: 'db', svid: svid.wit_svid })
  }
}

async function main () {
  await header()
  await x509()
  await jwt()
  await wit()
  client.close()
  console.log('ok')
}

main().catch(err => {
  console.error(err)
  process.exit(1)
})
