package config

import "regexp"

// later holds the keys that docs and examples of Narthex speak of and this
// version cannot honour. They are refused like unknown keys, so that nobody
// believes in a setting that does nothing, but by name, so that nobody looks
// for a typing error.
var later = map[string]bool{
	"agent.offline":                      true,
	"agent.node_attestor.sshpop":         true,
	"agent.node_attestor.tpm_devid":      true,
	"agent.node_attestor.http_challenge": true,
	"agent.node_attestor.aws_iid":        true,
	"agent.node_attestor.azure_msi":      true,
	"agent.node_attestor.azure_imds":     true,
	"agent.node_attestor.gcp_iit":        true,
	"agent.key_manager.pkcs11":           true,
	"agent.key_manager.tpm":              true,
	"agent.workload_attestors.docker":    true,
	"agent.workload_attestors.systemd":   true,
	"proxy.broker":                       true,
	"proxy.source=broker":                true,
	"proxy.source=acme":                  true,
	"proxy.listeners[].identity=owner":   true,
	"proxy.listeners[].identity=caller":  true,
}

const notYet = "not supported by this version"

var index = regexp.MustCompile(`\[\d+\]`)

// isLater reports whether the key, or this value of the key, is one of a
// later version.
func isLater(key, value string) bool {
	key = index.ReplaceAllString(key, "[]")
	return value == "" && later[key] || value != "" && later[key+"="+value]
}
