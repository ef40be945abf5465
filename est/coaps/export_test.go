package coaps

// AlertMeaning is alertMeaning, for the alerts that no server here sends at will.
var AlertMeaning = alertMeaning
