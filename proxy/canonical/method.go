package canonical

// Method returns a method as it was sent, which must be a token without
// letters in lower case: methods are case-sensitive (RFC 9110, section 9.1)
// and every registered one is in capitals, but some services take get for GET,
// past a rule that names GET. The error is an [*Error].
func Method(raw string) (string, error) {
	switch {
	case raw == "":
		return "", refuse(PartMethod, Empty, "", 0)
	case len(raw) > MaxMethod:
		return "", refuse(PartMethod, TooLong, "", 0)
	}
	for i := range len(raw) {
		switch {
		case tokenBytes[raw[i]] == notToken:
			return "", refuse(PartMethod, NotToken, raw, i)
		case 'a' <= raw[i] && raw[i] <= 'z':
			return "", refuse(PartMethod, LowerCase, raw, i)
		}
	}
	return raw, nil
}
